"""What the driver takes: trajectories that end at rest, goals, velocities, chunks that are slowed down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from shells import drivers, graph

from ros_nodes import messages as m
from ros_nodes.command_node import CommandCore
from ros_nodes.joints import JointTopic
from ros_nodes.node import CONTROL, DIAGNOSTICS, REQUEST, SIM_STATUS, Endpoint
from ros_nodes.request import Request
from ros_nodes.wire import Participant
from tests.ros.driver import MS, PERIOD, ROBOT, T0, Driver
from vla.embodiment import Embodiment, Output
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.runtime.gate import Reason
from vla.runtime.limits import JointLimits

PANDA = load_embodiment("panda")
ARM = tuple(name for name in ROBOT.command_names if name != "gripper")
TOPIC = "/arm_controller/joint_trajectory"


def with_outputs(*outputs: Output) -> Embodiment:
    return replace(ROBOT, command_topic="", outputs=outputs)


def test_a_trajectory_carries_its_own_stop_and_the_next_one_takes_over_on_it() -> None:
    driver = Driver(robot=with_outputs(Output(TOPIC, "trajectory", ARM), Output("/hand", "positions", ("gripper",))))
    driver.moving()
    sent = [s.message for _, s in driver.sent if s.topic == TOPIC][-12:]
    for message, after in itertools.pairwise(sent):
        assert message.names == ARM and message.times_ns[0] == PERIOD and np.all(np.diff(message.times_ns) > 0)
        assert message.velocities.shape == message.positions.shape == message.accelerations.shape
        assert not np.any(message.velocities[-1]) and np.any(message.velocities[0])
        # As planned: one period on, and then braking from there.
        np.testing.assert_allclose(after.positions[0], message.positions[1], atol=1e-6)
        assert message.times_ns[0] + 2 * PERIOD <= 150 * MS, "no further than the watchdogs reach"
        speed = np.abs(np.diff(message.positions, axis=0))[2:]
        assert np.all(np.diff(speed, axis=0) <= 1e-9), "after the planned actions it only slows down"
    hand = [s.message for _, s in driver.sent if s.topic == "/hand"][-1]
    assert hand.data.shape == (1,) and not driver.goals


def test_a_joint_position_robot_with_jerk_limits_runs_without_a_model() -> None:
    robot = load_embodiment("panda")
    driver = Driver(robot=robot)
    driver.run(50)
    driver.begin()
    driver.run(1500)
    topic = robot.outputs[0].topic
    rows = np.array([s.message.positions[0] for _, s in driver.sent if s.topic == topic])
    assert rows[-1, 0] > 0.05 and driver.status_now()["verdict"] in ("pass", "reshape")
    limits = robot.joints[0]
    for order, bound in ((1, limits.max_velocity), (2, limits.max_acceleration), (3, limits.max_jerk)):
        assert np.all(np.abs(np.diff(rows[:, 0], order)) / 0.05**order <= bound * (1 + 1e-6))
    (goal,) = driver.goals[:1]
    assert (goal.action, goal.type_name) == ("/panda_gripper/gripper_action", "control_msgs/action/GripperCommand")
    assert goal.goal.data[0] == pytest.approx(0.04)
    assert len(driver.goals) == 1, "a hand that stays as it is gets no new goal"
    assert driver.core.actions == ((goal.action, goal.type_name),)


def test_the_same_trajectory_as_a_goal_for_the_action() -> None:
    name = "/arm_controller/follow_joint_trajectory"
    driver = Driver(robot=with_outputs(Output(name, "follow_joint_trajectory", ROBOT.command_names)))
    driver.run(50)
    driver.begin()
    driver.run(500)
    goal = driver.goals[-1]
    assert goal.action == name and goal.type_name == "control_msgs/action/FollowJointTrajectory"
    assert isinstance(goal.goal, m.Trajectory) and not np.any(goal.goal.velocities[-1])
    assert all(endpoint.topic != name for endpoint in driver.core.publications)


def test_a_driver_that_does_not_follow_stops_the_arm_until_it_does_again() -> None:
    name, hand = "/arm_controller/follow_joint_trajectory", "/hand/gripper_action"
    robot = with_outputs(Output(name, "follow_joint_trajectory", ARM), Output(hand, "gripper_command", ("gripper",)))
    driver = Driver(robot=robot)

    def says(action: str, reason: str) -> None:
        driver.perform(driver.core.on_reject(action, reason, driver.now()))

    driver.run(50)
    driver.begin()
    for _ in range(1000):  # an arm that follows its goals
        driver.run(1)
        driver.positions = driver.core._loop.gate.command
    assert driver.status_now()["verdict"] in ("pass", "reshape")
    says(hand, f"{hand}: the controller aborted the goal (stalled at 0.01)")
    driver.run(250)
    assert driver.status_now()["verdict"] in ("pass", "reshape"), "a hand that holds something is no reason to stop"
    assert "stalled" in driver.diagnosis().message and driver.diagnosis().level == m.WARN
    count = len(driver.goals)
    says(name, f"{name}: the controller aborted the goal (path tolerance violated)")
    assert len(driver.goals) == count, "first goes out what is being sent"
    driver.run(1)
    assert driver.status_now()["verdict"] == "stop" and driver.status_now()["reason"] == Reason.DRIVER.text
    assert [g.action for g in driver.goals[count:]] == [name], "a brake between control periods"
    driver.run(300)
    assert driver.diagnosis().level == m.ERROR and "path tolerance violated" in driver.diagnosis().message
    held = [goal for goal in driver.goals[count:] if goal.action == name]
    assert len(held) >= 6, "goals that hold ask whether the driver is there again"
    np.testing.assert_allclose(held[-1].goal.positions[-1], held[-1].goal.positions[0])
    driver.run(1000)
    assert driver.status_now()["verdict"] == "stop", "nobody said that goals are taken"
    says(name, f"{name}: no action server")
    driver.run(1000)
    says(name, "")
    driver.run(900)
    assert driver.status_now()["reason"] == Reason.DRIVER.text, "a goal that was taken may still be aborted"
    for _ in range(600):
        driver.run(1)
        driver.positions = driver.core._loop.gate.command
    assert driver.status_now()["verdict"] in ("pass", "reshape") and "server" not in driver.diagnosis().message


class Driven(Driver):
    """A Panda that does a share of the velocities it is told, and a policy that swings its first joint; looks: from
    where it is, else wherever it is."""

    def __init__(self) -> None:
        self.looks, self.goal, self.lag_ms, self.past = False, math.nan, 0, list[np.ndarray]()
        self.share, self.told, self.speeds = 1.0, np.zeros(len(PANDA.joints)), list[tuple[int, np.ndarray]]()
        sink = Output("/velocity", "velocities", PANDA.command_names, timeout_s=0.1)
        super().__init__(robot=replace(PANDA, command_topic="", outputs=(sink,)))

    def chunk(self, request: Request, actions: Any = None, number: int | None = None) -> None:
        times = (request.start_ns - T0) / 1e9 + 0.05 * np.arange(1, 17)
        rows = np.tile(np.float32(self.robot.home), (16, 1))
        rows[:, 0] = self.positions[0] + 0.3 * (times - times[0]) if self.looks else 0.6 * np.sin(0.8 * times)
        if not math.isnan(self.goal):  # 0.6 rad/s towards it
            rows[:, 0] = np.clip(self.goal, *(self.positions[0] + np.outer((-0.6, 0.6), times - times[0] + 0.1)))
        super().chunk(request, rows if actions is None else actions, number)

    def run(self, milliseconds: int) -> None:
        for _ in range(milliseconds):
            count = len(self.sent)
            super().run(1)
            for _, sent in self.sent[count:]:
                if sent.topic == "/velocity":
                    self.told = sent.message.data
                    self.speeds.append((self.time_ns, self.told))
            self.positions = self.positions + self.share * self.told * 1e-3
            self.past.append(self.positions)

    def joints(self, topic: JointTopic) -> m.JointState:
        found = super().joints(topic)
        then = self.past[-1 - self.lag_ms] if len(self.past) > self.lag_ms else self.positions
        return replace(found, positions=then[topic.places])


@pytest.fixture
def driven() -> Driven:
    driver = Driven()
    driver.run(50)
    driver.begin()
    driver.run(1500)
    return driver


def test_velocities_are_zero_once_the_arm_is_stopped(driven: Driven) -> None:
    assert np.any(driven.told)
    driven.give(CONTROL.topic, m.Text.of(op="stop"))
    driven.run(500)
    assert not np.any(driven.told)


def within_limits(driven: Driven) -> bool:
    """The velocities sent, and their changes."""
    at, speeds = np.array([t for t, _ in driven.speeds]) / 1e9, np.array([v for _, v in driven.speeds])
    limits, changes = JointLimits.of(driven.robot), np.abs(np.diff(speeds, axis=0))
    return bool(
        np.all(np.abs(speeds) <= limits.velocity + 1e-9)
        and np.all(changes <= limits.acceleration * np.diff(at)[:, None] + 1e-9)
    )


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_an_arm_that_follows_velocities_imprecisely_is_brought_back_to_its_path(share: float, driven: Driven) -> None:
    driven.share = share
    for _ in range(5):
        driven.run(1000)
        assert np.max(np.abs(driven.positions - driven.core._loop.gate.command)) < 0.12
    driven.goal = float(driven.positions[0]) + 0.1
    driven.run(4000)
    assert abs(driven.positions[0] - driven.goal) < 0.02, "what is held is reached, too"
    assert within_limits(driven)


@pytest.mark.parametrize("share", [1.0, 1.05])
@pytest.mark.parametrize("lag_ms", [0, 40])
def test_an_arm_driven_by_velocities_does_not_pass_its_goal(share: float, lag_ms: int, driven: Driven) -> None:
    """Nor the limit, which is the goal here. lag_ms: of the joint states."""
    limit = driven.robot.joints[0].upper
    driven.share, driven.lag_ms, driven.positions[0] = share, lag_ms, limit - 0.8
    driven.give(CONTROL.topic, m.Text.of(op="stop"))
    driven.run(300)
    driven.goal, most = limit, 0.0
    driven.give(CONTROL.topic, m.Text.of(op="resume"))
    for _ in range(400):
        driven.run(10)
        most = max(most, float(driven.positions[0]))
    assert abs(driven.positions[0] - limit) < 0.02
    assert most - limit < (1e-6 if share == 1.0 else 0.03), "by no more than its share of the way"


def test_nothing_speeds_up_during_a_stop(driven: Driven) -> None:
    driven.positions[0] -= 0.5  # where it cannot be: the joint states jumped
    driven.run(1)
    count, fast = len(driven.speeds), np.max(np.abs(driven.told))
    driven.run(400)
    assert driven.status_now()["reason"] == Reason.JOINT_STATE_JUMP.text
    assert np.max(np.abs([v for _, v in driven.speeds[count:]])) <= fast + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_velocities_stay_within_limits_whatever_happens_and_end_at_zero(seed: int, driven: Driven) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        driven.share = float(rng.choice([0.0, 0.7, 1.0, 1.2]))
        driven.policy_alive, driven.joints_alive = rng.random(2) > 0.2
        driven.looks = bool(rng.random() < 0.5)
        driven.run(int(rng.integers(50, 900)))
        driven.give(CONTROL.topic, m.Text.of(op=str(rng.choice(["stop", "resume", "resume", "resume"]))))
    driven.share, driven.policy_alive, driven.joints_alive = 1.0, True, True
    driven.give(CONTROL.topic, m.Text.of(op="stop"))
    driven.run(500)
    assert within_limits(driven) and not np.any(driven.told) and len(driven.speeds) > 60


def test_an_arm_driven_by_velocities_that_did_not_follow_stays_where_it_stands_and_goes_on(driven: Driven) -> None:
    """Its driver paused, and follows again at the very moment that it is noticed."""

    def until(condition: Callable[[], bool]) -> None:
        end = driven.time_ns + 8000 * MS
        while not condition():
            assert driven.time_ns < end
            driven.run(1)

    driven.share = 0.0
    until(lambda: driven.status_now()["reason"] == Reason.TRACKING.text)
    driven.looks, driven.share, stood = True, 1.0, driven.positions.copy()
    until(lambda: not np.any(driven.told))
    assert np.max(np.abs(driven.positions - stood)) < 0.05, "it brakes, and does not go after its command"
    driven.run(60)
    np.testing.assert_allclose(driven.core._loop.gate.command, driven.positions, atol=0.03)
    driven.run(1000)
    assert driven.status_now()["verdict"] in ("pass", "reshape")
    driven.give(CONTROL.topic, m.Text.of(op="stop"))
    driven.run(500)
    assert not np.any(driven.told)


def test_without_action_clients_the_grippers_goal_is_on_its_twin_with_every_command() -> None:
    twin = "/panda_gripper/gripper_action/commands"
    driver = Driver(robot=PANDA, actions=False)
    assert driver.core.must_be_heard == (twin,) and not driver.core.actions
    assert {e.topic: e.type_name for e in driver.core.publications}[twin] == m.Values.type_name
    driver.run(50)
    driver.begin()
    driver.run(1000)
    assert not driver.goals
    arm = [at for at, s in driver.sent if s.topic == "/panda_arm_controller/joint_trajectory"]
    hand = [(at, s.message.data.tolist()) for at, s in driver.sent if s.topic == twin]
    assert [at for at, _ in hand] == arm, "whoever comes late, or comes back, is told"
    assert [value for _, (value,) in hand] == pytest.approx([0.04] * len(hand))
    driver.give(SIM_STATUS.topic, m.Text.of(state="done", episode=0, success=True, steps=20))
    at = driver.time_ns
    driver.run(300)
    assert not [1 for sent, s in driver.sent if s.topic == twin and sent > at], "nothing after the episode"


def test_a_hand_that_nobody_relays_is_said_by_the_wheel() -> None:
    twin = Endpoint("/panda_gripper/gripper_action/commands", m.Values.type_name)

    def said(words: str) -> Callable[[m.Diagnostics], bool]:
        return lambda message: words == message.statuses[0].values.get(twin.topic, "")

    with graph("wheel") as found, Participant("relay", domain=found.domain) as relay:
        found.listen(DIAGNOSTICS)
        with drivers(found, PANDA):
            found.operator.start()
            process = found.start("command", embodiment="panda")
            found.say(CONTROL, m.Text.of(op="go", episode=1, seed=1))
            found.hear(DIAGNOSTICS.topic, said(f"{twin.topic}: nobody listens; start the relay of docs/ros2.md"))
            goals: list[bytes] = []
            relay.subscribe(twin.topic, twin.type_name, twin.quality, lambda data, _: goals.append(data))
            relay.start()
            found.wait(lambda: bool(goals), "a goal")
            found.heard[DIAGNOSTICS.topic].clear()
            found.hear(DIAGNOSTICS.topic, said(""))
        assert m.decode(twin.type_name, goals[-1]).data.tolist() == [pytest.approx(0.04)]
        assert found.end(process)[0] == 0


def test_trajectory_goals_need_a_shell_that_has_actions() -> None:
    from ros_nodes.command_node import main

    with pytest.raises(ConfigError, match=r"need rclpy.*kind: trajectory"):
        main(["--embodiment", "tabletop", "--output", "follow_joint_trajectory", "--output-topic", "/arm"])


def test_the_output_can_be_chosen_on_the_command_line() -> None:
    from ros_nodes import settings
    from ros_nodes.command_node import build

    def made(**values: Any) -> CommandCore:
        options = settings.options(settings.COMMAND, values)
        options.actions = True
        return build(options)

    core = made(embodiment="panda", output="positions", output_topic="/position/commands")
    assert core.publications[0].topic == "/position/commands" and not core.actions
    with pytest.raises(ConfigError, match="output_topic"):
        made(embodiment="panda", output="positions")
    with pytest.raises(ConfigError, match="timeout_s"):
        made(embodiment="tabletop", output="velocities")
    core = made(embodiment="tabletop", output="velocities", driver_timeout=0.1)
    assert core.publications[0].topic == ROBOT.command_topic


def test_the_status_tells_how_much_a_chunk_is_slowed_down() -> None:
    driver = Driver(robot=replace(load_embodiment("panda"), max_time_scale=3.0))
    driver.run(50)
    driver.policy_alive = False
    driver.begin()
    driver.run(300)
    request = next(Request.read(s.message) for _, s in driver.sent if s.topic == REQUEST.topic)
    rows = np.tile(driver.positions, (16, 1))
    rows[:, 0] += 0.12 * np.arange(1, 17) ** 2 / 16  # up to 4.7 rad/s
    driver.policy_alive, driver.lose = True, 99
    driver.chunk(request, rows.astype(np.float32))
    driver.run(200)
    assert 1.3 < driver.status_now()["time_scale"] < 3.0
    assert driver.status_now()["reason"] in (Reason.TIME_SCALED.text, Reason.JERK.text, Reason.ACCELERATION.text)
