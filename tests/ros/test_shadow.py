"""`vla doctor --shadow`: a policy beside an operator, compared action by action, without middleware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ros_nodes.messages import Image, JointState, Text, Trajectory
from ros_nodes.node import INSTRUCTION, Job, Now
from ros_nodes.policy_node import PolicyCore
from ros_nodes.shadow import DOUBT, OK, WRONG, Shadow, compare, findings
from vla.data.actions import Commands, CommandSet, Sent
from vla.policy import DecodeReport, InferContext, InferResult
from vla.resources import load_embodiment
from vla.types import ActionChunk, Observation

PANDA = load_embodiment("panda")
ROBOT = replace(PANDA, cameras=tuple(replace(camera, height=8, width=8) for camera in PANDA.cameras))
TABLETOP = load_embodiment("tabletop")
T0, MS, HORIZON = 1_700_000_000_000_000_000, 1_000_000, 8
PERIOD = 50 * MS


def operator(at_ns: np.ndarray) -> np.ndarray:
    """float64[T, D]: where the operator wants the joints; all swing, each at its own pace, the last one stands."""
    at = np.atleast_1d(at_ns - T0)[:, None] / 1e9
    out = np.array(PANDA.home) + 0.4 * np.sin(at * (1 + np.arange(8) / 4))
    out[:, 6] = PANDA.home[6]
    out[:, 7] = np.where(np.sin(at[:, 0]) > 0, 0.04, 0.0)
    return out


MEASURED = T0 + 10 * MS * np.arange(600)
COMMANDS = CommandSet([(np.arange(8), Commands([Sent(int(t), np.array([t]), operator(t)) for t in MEASURED]))], 8)
NOBODY = CommandSet([], 8)


def chunks(change: np.ndarray, about: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """What the operator will do, its motion since the chunk began changed by a factor per joint."""
    out = []
    for start in range(T0 + 100 * MS, T0 + 5000 * MS, 4 * PERIOD):
        will = operator(start + PERIOD * np.arange(1, HORIZON + 1))
        there = operator(np.array([start]))
        there[:, 7] = about[7]
        out.append((start, (there + change * (will - there)).astype(np.float32)))
    return out


@pytest.mark.parametrize("commands", [COMMANDS, NOBODY], ids=["commanded", "measured"])
def test_dimensions_that_are_opposite_or_scaled_are_named(commands: CommandSet) -> None:
    middle = np.full(8, 0.02)
    change = np.array([1.0, -1.0, 180 / np.pi, 1 / 8, 0.0, 1.0, 1.0, -1.0])
    made = compare(ROBOT, chunks(change, middle), MEASURED, operator(MEASURED), commands)
    found = {d.name: d for d in made.dimensions}
    assert made.commanded is (commands is COMMANDS) and made.chunks > 20
    verdicts = [d.verdict for d in made.dimensions]
    assert verdicts == [OK, WRONG, WRONG, WRONG, DOUBT, OK, OK, WRONG]
    assert "opposite" in found["panda_joint2"].words and found["panda_joint2"].alike < -0.9
    assert "degrees for radians" in found["panda_joint3"].words
    assert found["panda_joint4"].scale == pytest.approx(1 / 8, rel=0.1)
    assert "hardly moved" in found["panda_joint7"].words and np.isnan(found["panda_joint7"].alike)
    assert "opposite" in found["gripper"].words
    assert found["panda_joint1"].error_p95 < 0.02 < found["panda_joint2"].error_mean


def test_deltas_of_a_tool_are_compared_as_motions() -> None:
    """The tabletop arm turns about its base: the tool swings along y. A policy that says -y is opposite in y only."""
    home = np.array(TABLETOP.home)

    def arm(at_ns: np.ndarray) -> np.ndarray:
        rows = np.repeat(home[None], len(np.atleast_1d(at_ns)), 0)
        rows[:, 0] = 0.3 * np.sin(np.atleast_1d(at_ns - T0) / 1e9)
        return rows

    stamps = T0 + 10 * MS * np.arange(300)
    said = []
    for start in range(T0 + 100 * MS, T0 + 2000 * MS, 2 * PERIOD):
        y = 0.5 * np.diff(arm(start + PERIOD * np.arange(HORIZON + 1))[:, 0])
        said.append((start, np.zeros((HORIZON, 7), np.float32)))
        said[-1][1][:, 1], said[-1][1][:, 6] = -y, 1.0
    found = {d.name: d for d in compare(TABLETOP, said, stamps, arm(stamps), NOBODY).dimensions}
    assert found["dy"].verdict == WRONG and found["dy"].scale == pytest.approx(1, rel=0.2)
    assert found["gripper"].verdict == OK and "hardly" in found["dz"].words


class Steps:
    """Says what the operator will do, or where the arm is."""

    def __init__(self, still: bool = False) -> None:
        self.still = still
        self.embodiment, self.horizon, self.seen = ROBOT, HORIZON, list[str]()

    def reset(self, seed: int) -> None: ...

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        self.seen += [observation.instruction for observation in observations]
        ahead = PERIOD * np.arange(1, HORIZON + 1) * (not self.still)
        rows = [operator(o.stamp_ns + ahead).astype(np.float32) for o in observations]
        return [InferResult(ActionChunk(row, 1, 0.05), DecodeReport()) for row in rows]


def drive(shadow: Shadow, jobs: list[Job], instruction: str = "", commands: bool = True) -> None:
    """Five seconds of a graph. Inference takes 30 ms."""
    arm = "/panda_arm_controller/joint_trajectory"
    picture, names, due = np.zeros((8, 8, 3), np.uint8), ROBOT.command_names, 0
    if instruction:
        shadow.on_message(INSTRUCTION.topic, Text(instruction), Now(T0, 0, 0))
    for at in range(0, 5000, 10):
        stamp, now = T0 + at * MS, Now(T0 + at * MS, at * MS, at * MS)
        row = operator(np.array([stamp]))
        shadow.on_message("/joint_states", JointState(stamp, names, row[0]), now)
        if commands:
            shadow.on_message(arm, Trajectory(0, names[:7], row[:, :7], (0,)), now)
        if at % 40 == 0:
            for camera in ROBOT.cameras:
                shadow.on_message(camera.topic, Image(stamp, "", "rgb8", picture), now)
        if jobs and due == 0:
            due = at + 30
        if jobs and at >= due:
            due, job = 0, jobs.pop()
            shadow.on_result(job.name, job.run(), now)
        shadow.tick(now)


def made(policy: object, instruction: str = "") -> tuple[Shadow, list[Job]]:
    jobs: list[Job] = []
    core = PolicyCore(policy, ROBOT.joint_state_vector)  # type: ignore[arg-type]
    return Shadow(core, jobs.append, instruction), jobs


@pytest.mark.parametrize("commands", [True, False])
def test_a_policy_that_agrees_passes_and_nothing_is_sent(commands: bool) -> None:
    policy = Steps()
    shadow, jobs = made(policy)
    drive(shadow, jobs, "fold the towel", commands)
    enough, *dimensions = findings(shadow)
    assert enough.state == OK and len(shadow.chunks) > 15, enough
    assert {d.state for d in dimensions} == {OK} and set(policy.seen) == {"fold the towel"}
    assert ("an operator's commands" in enough.got) is commands
    assert not {"/vla/chunk", "/vla/heartbeat", "/vla/request"} & {e.topic for e in shadow.subscriptions}


def test_a_policy_that_stands_still_has_little_to_do_with_it() -> None:
    shadow, jobs = made(Steps(still=True), "fold the towel")
    drive(shadow, jobs)
    verdicts = {finding.name: finding.state for finding in findings(shadow)}
    assert verdicts["action panda_joint1"] == DOUBT and verdicts["chunks"] == OK


def test_what_the_policy_lacks_is_said() -> None:
    shadow, jobs = made(Steps())
    drive(shadow, jobs)
    (only,) = findings(shadow)
    assert only.state == WRONG and "no instruction" in only.remedy
