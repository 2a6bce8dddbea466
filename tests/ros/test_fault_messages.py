"""Faults that come as messages, or as none, injected at the cores on an exact clock: the arm brakes and says why.

Those of processes are in test_faults.py, further ones of joint states, cameras and clocks in test_command_core.py.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from policies.hold import ScriptedPolicy
from ros_nodes import messages as m
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    DEADMAN,
    EMERGENCY_STOP,
    HEARTBEAT,
    INSTRUCTION,
    JOINT_STATES,
    PICTURE_KEY,
    REQUEST,
    RESET,
    SIM_STATUS,
    STAMP_KEY,
    Effects,
    Job,
    Now,
    Send,
)
from ros_nodes.policy_node import PolicyCore
from ros_nodes.sim_node import SimCore
from sim.environment import make
from tests.ros.driver import MS, PERIOD, ROBOT, T0, Driver
from vla.runtime.gate import Reason, Verdict


def test_joint_states_that_stop_are_noticed_at_120_ms_and_not_at_the_next_period() -> None:
    driver = Driver().moving()
    driver.run((20 - driver.time_ns // MS % 50) % 50 or 50)
    driver.joints_alive, last = False, driver.time_ns
    driver.run(400)
    stop = driver.core.summary()["stops"][-1]
    assert stop["reason"] == Reason.JOINT_STATE_STALE.text and stop["stamp_ns"] - T0 - last <= 121 * MS


@pytest.mark.parametrize(("usual_ms", "stops"), [(20, False), (70, True)])
def test_a_policy_that_becomes_ten_times_slower(usual_ms: int, stops: bool) -> None:
    """While the chunk that runs lasts, nothing is lost; when it is spent the arm brakes in that very period."""
    driver = Driver()
    driver.answer_after_ns = usual_ms * MS
    driver.moving()
    driver.answer_after_ns = 10 * usual_ms * MS
    driver.run(4000)
    reasons = {stop["reason"] for stop in driver.core.summary()["stops"]}
    assert reasons == ({Reason.NO_ACTION.text} if stops else set())
    if stops:
        times, verdicts = [t for t, _ in driver.commands()], driver.core._loop.trace.verdict
        stopped = int(np.flatnonzero(verdicts[: len(times)] == Verdict.STOP)[2])  # the first two wait for a chunk
        assert times[stopped] - times[stopped - 1] <= 150 * MS
        assert any(
            Reason.NO_ACTION.text in s.message.statuses[0].message for _, s in driver.sent if s.topic == "/diagnostics"
        )
    driver.answer_after_ns = usual_ms * MS
    driver.run(1500)
    before = len(driver.core.summary()["stops"])
    driver.run(2000)
    assert len(driver.core.summary()["stops"]) == before and driver.status_now()["verdict"] in ("pass", "reshape")


@pytest.mark.parametrize("fault", ["dies", "repeats an old frame"])
def test_a_camera_that_is_lost_stops_the_arm(fault: str) -> None:
    driver = Driver()
    driver.beat = None
    driver.moving()
    driver.run((7 - driver.time_ns // MS % 50) % 50 or 50)
    last = driver.pictures()
    at, taken = driver.time_ns, int(last[STAMP_KEY + "wrist"]) - T0
    for _ in range(16):
        now = driver.pictures()
        kept = STAMP_KEY if fault == "dies" else "nothing"
        driver.beat = now | {key: last[key] for key in now if key.startswith((kept, PICTURE_KEY)) and "wrist" in key}
        driver.run(50)
        driver.beat = None
    said = driver.diagnosis()
    assert driver.status()["reason"] == Reason.CAMERA.text and "wrist" in said.values["camera"]
    stop = driver.core.summary()["stops"][-1]["stamp_ns"] - T0
    if fault == "dies":
        assert stop - taken <= PERIOD + 150 * MS, "within 150 ms of the picture that did not come"
    else:
        assert stop > at and "same picture" in said.values["camera"]
    driver.run(1000)
    assert driver.status()["verdict"] in ("pass", "reshape")


@pytest.mark.parametrize("hz", [60, 30, 25, 20, 15])
def test_braking_begins_within_150_ms_of_the_picture_that_did_not_come(hz: int) -> None:
    """At any rate of the camera, and at any time within control periods and heartbeats."""
    for after_ms in range(1, 51, 7):
        driver = Driver()
        driver.beat, driver.camera_ns = None, round(1e9 / hz)
        driver.moving()
        driver.run(after_ms)
        driver.beat = driver.pictures()
        due_ns = int(driver.beat[STAMP_KEY + "wrist"]) + driver.camera_ns
        driver.run(300)
        stop = driver.core.summary()["stops"][-1]
        assert stop["reason"] == Reason.CAMERA.text and 130 * MS < stop["stamp_ns"] - due_ns <= 150 * MS


def test_a_policy_that_falls_silent_is_no_camera_fault() -> None:
    driver = Driver()
    driver.beat = None
    driver.moving()
    driver.policy_alive = False
    driver.run(500)
    assert [stop["reason"] for stop in driver.core.summary()["stops"]] == [Reason.HEARTBEAT.text]


def test_a_still_picture_of_a_still_arm_is_no_fault() -> None:
    driver = Driver()
    driver.beat = None
    driver.moving()
    still = {key: value for key, value in driver.pictures().items() if key.startswith(PICTURE_KEY)}
    for _ in range(20):
        driver.beat = None
        driver.beat = driver.pictures() | still
        driver.give(CONTROL.topic, m.Text.of(op="stop"))
        driver.run(50)
    assert driver.status()["reason"] == Reason.OPERATOR.text and "camera" not in driver.diagnosis().values


class WithPolicy(Driver):
    """The command core and the policy core, with nothing between them."""

    def __init__(self) -> None:
        chunk = np.zeros((16, 7), np.float32)
        chunk[:, 1], chunk[:, 6] = 0.005, 1.0
        self.policy = PolicyCore(ScriptedPolicy(ROBOT, [chunk]), lambda q: q[:7].astype(np.float32))
        self.sizes = {camera.name: camera.height for camera in ROBOT.cameras}
        super().__init__()
        self.policy_alive = False  # the stand-in

    def hear(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Job):
                self.hear(self.policy.on_result(effect.name, effect.run(), self.now()))
            else:
                self.give(effect.topic, effect.message)

    def perform(self, effects: Effects) -> None:
        super().perform(effects)
        for effect in effects:
            if isinstance(effect, Send) and effect.topic == REQUEST.topic:
                self.hear(self.policy.on_message(effect.topic, effect.message, self.now()))

    def run(self, milliseconds: int) -> None:
        for _ in range(milliseconds):
            super().run(1)
            now = self.now()
            if self.time_ns % PERIOD == 0:
                joints = m.JointState(now.stamp_ns, self.names, self.positions)
                self.hear(self.policy.on_message(JOINT_STATES.topic, joints, now))
                for camera in ROBOT.cameras:
                    size = self.sizes[camera.name]
                    picture = np.full((size, size, 3), self.time_ns // PERIOD % 256, np.uint8)
                    self.hear(self.policy.on_message(camera.topic, m.Image(now.stamp_ns, "", "rgb8", picture), now))
            if self.time_ns >= self.policy.next_tick_ns:
                self.hear(self.policy.tick(now))


def test_a_camera_that_changes_its_size() -> None:
    driver = WithPolicy()
    driver.hear(driver.policy.on_message(INSTRUCTION.topic, m.Text("go"), driver.now()))
    driver.moving()
    driver.sizes["wrist"] = 64
    at = driver.time_ns
    driver.run(600)
    stop = driver.core.summary()["stops"][-1]
    assert stop["reason"] == Reason.CAMERA.text and stop["stamp_ns"] - T0 - at <= PERIOD + 150 * MS
    said = driver.diagnosis()
    assert said.level == m.ERROR and "wrist" in said.values["camera"]
    assert "128x128" in said.values["policy"] and "64x64" in said.values["policy"]
    driver.sizes["wrist"] = 128
    driver.run(1500)
    assert driver.status_now()["verdict"] in ("pass", "reshape")


def test_of_two_policies_the_one_that_is_left_goes_on() -> None:
    driver = Driver().moving()
    driver.number = 5 << 20  # the first one ended, and the second one's heartbeat hides it
    driver.run(1000)
    assert driver.status_now()["reason"] == Reason.SECOND_POLICY.text
    driver.run(4000)
    assert driver.status_now()["verdict"] in ("pass", "reshape") and "policies" not in driver.diagnosis().values


@pytest.mark.parametrize("topic", [JOINT_STATES.topic, "/clock"])  # the shell hears /clock, not the core
def test_messages_that_cannot_be_read_are_named_for_a_second(topic: str) -> None:
    driver = Driver().moving()
    driver.perform(driver.core.on_reject(topic, "cut short", driver.now()))
    driver.run(300)
    assert driver.diagnosis().level == m.WARN and driver.diagnosis().values[topic] == f"{topic}: cut short"
    assert f"{topic}: cut short" in driver.diagnosis().message
    driver.run(1200)
    assert driver.diagnosis().level == m.OK


def test_words_that_mean_nothing_are_named_for_a_second() -> None:
    driver = Driver().moving()
    driver.give(CONTROL.topic, m.Text('{"op":"stpo"}'))
    driver.give(SIM_STATUS.topic, m.Text("{}"))
    driver.run(300)
    assert driver.diagnosis().level == m.WARN and {CONTROL.topic, SIM_STATUS.topic} <= set(driver.diagnosis().values)
    assert "Did you mean 'stop'" in driver.core.refusal(CONTROL.topic)
    driver.run(1200)
    assert driver.diagnosis().level == m.OK


def test_a_flood_of_saves_is_one_job_at_a_time() -> None:
    driver = Driver()
    save = (CONTROL.topic, m.Text.of(op="save"), driver.now())
    assert sum(isinstance(effect, Job) for _ in range(100) for effect in driver.core.on_message(*save)) == 1
    driver.core.on_result("save", "", driver.now())
    assert sum(isinstance(effect, Job) for effect in driver.core.on_message(*save)) == 1


def test_joint_states_far_beyond_the_limits_are_no_joint_states() -> None:
    driver = Driver()
    driver.offset[:] = 57.3  # degrees, or bytes
    driver.run(50)
    driver.begin()
    driver.run(500)
    assert not driver.commands() and "units" in driver.diagnosis().values["joint_states"]
    driver.offset[:] = 0.0
    driver.run(1000)
    assert driver.status_now()["verdict"] in ("pass", "reshape")


# ---- well-formed nonsense ----
NUMBERS: list[Any] = [
    0, -1, 7, 2**63 - 1, -(2**63), 10**30, 10**400, 1e999, float("nan"), 1e308, "x", "", None, True, [], {}, [[1e999]],
    "٣", "--5", "9" * 19, 3.7,
]  # fmt: skip
WORDS = ("go", "stop", "resume", "done", "save", "running", "push", "red cube")
KEYS = (
    "op", "episode", "seed", "state", "start_ns", "success", "steps", "instruction", "family", "v", "number",
    "infer_seed", "previous", "previous_start_ns", "executed", "committed", "task", "swap", "goal", "init_state",
)  # fmt: skip


class Nonsense:
    """Messages of the right type with anything in them, repeatable."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def text(self) -> m.Text:
        rng = self.rng
        if rng.random() < 0.1:
            return m.Text(rng.choice(["", "[]", "{", "null", "\0", '{"a":' + "9" * 5000 + "}"]))
        values = {key: rng.choice([rng.choice(NUMBERS), rng.choice(WORDS), 1]) for key in KEYS if rng.random() < 0.7}
        values |= {"state": rng.choice(["running", "done"])} if rng.random() < 0.5 else {}
        if rng.random() < 0.3:
            values = {key: values[key] for key in ("task", "swap", "goal", "instruction") if key in values}
            values |= {"episode": rng.randrange(99), "seed": 1}
        return m.Text(json.dumps(values))

    def row(self, count: int) -> np.ndarray:
        return np.array([self.rng.choice([0.0, 1e308, -1e308, np.nan, np.inf, 3.0]) for _ in range(count)])

    def stamp(self, now: Now) -> int:
        return self.rng.choice([0, now.stamp_ns, -(2**60), 2**60])

    def joints(self, now: Now, positions: np.ndarray) -> m.JointState:
        names = list(ROBOT.command_names)
        self.rng.shuffle(names)
        names = names[: self.rng.choice([2, 8, 8, 8])] * self.rng.choice([1, 1, 2])
        good = self.rng.random() < 0.5 and len(names) == len(positions)
        return m.JointState(self.stamp(now), tuple(names), positions if good else self.row(len(names)))

    def chunk(self, now: Now) -> m.Trajectory:
        count = self.rng.choice([0, 1, 16])
        identity = self.rng.choice(["", f"v1/0/{self.rng.randrange(99)}/3/4/5/6", "v1/0/1/" + "9" * 300 + "/0/0/0"])
        rows = np.array([self.row(7) for _ in range(count)]).reshape(count, 7) * self.rng.choice([0, 1])
        names = self.rng.choice([ROBOT.action_names, ROBOT.action_names, tuple("abcdefg")])
        return m.Trajectory(self.stamp(now), names, rows, tuple(i * PERIOD for i in range(count)), identity)

    def heartbeat(self, now: Now) -> m.Status:
        stamps = {STAMP_KEY + c: str(self.rng.choice([*NUMBERS, now.stamp_ns])) for c in ROBOT.camera_names}
        said = {PICTURE_KEY + c: str(self.rng.choice(NUMBERS)) for c in ROBOT.camera_names}
        return m.Status(self.rng.randrange(256), "", "y" * 9999, stamps | said | {"queue": self.rng.choice(["0", "x"])})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(3))
def test_nonsense_on_every_topic_of_the_command_core(seed: int) -> None:
    driver, say = Driver().moving(), Nonsense(seed)
    before = len(driver.sent)
    for _ in range(300):
        kinds = {
            JOINT_STATES.topic: lambda now: say.joints(now, driver.positions), CHUNK.topic: lambda now: say.chunk(now),
            HEARTBEAT.topic: lambda now: say.heartbeat(now), SIM_STATUS.topic: lambda _: say.text(),
            CONTROL.topic: lambda _: say.text(),
            EMERGENCY_STOP.topic: lambda _: m.Flag(say.rng.random() < 0.1), DEADMAN.topic: lambda _: m.Flag(True),
        }  # fmt: skip
        topic = say.rng.choice(list(kinds))
        driver.give(topic, kinds[topic](driver.now()))
        driver.run(say.rng.choice([0, 1, 30]))
    sent = [s.message for _, s in driver.sent[before:]]
    assert all(np.all(np.isfinite(message.data)) for message in sent if isinstance(message, m.Values))
    assert all(m.encode(message) for message in sent)
    driver.give(EMERGENCY_STOP.topic, m.Flag(False))
    driver.give(CONTROL.topic, m.Text.of(op="resume"))
    driver.begin(episode=4321)  # no restart: the next episode is like any other
    driver.run(6000)
    assert driver.status_now()["verdict"] in ("pass", "reshape"), (driver.status_now(), driver.diagnosis())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nonsense_on_every_topic_of_the_policy_core() -> None:
    driver, say = WithPolicy(), Nonsense(0)
    picture = lambda now: m.Image(say.stamp(now), "", "mono8", np.zeros((128, 128, 1), np.uint8))  # noqa: E731
    driver.hear(driver.policy.on_message(INSTRUCTION.topic, m.Text("go"), driver.now()))
    driver.moving()
    for _ in range(300):
        kinds = {
            JOINT_STATES.topic: lambda now: say.joints(now, driver.positions), REQUEST.topic: lambda _: say.text(),
            INSTRUCTION.topic: lambda _: say.text(),
            **dict.fromkeys((c.topic for c in ROBOT.cameras), picture),
        }  # fmt: skip
        topic = say.rng.choice(list(kinds))
        driver.hear(driver.policy.on_message(topic, kinds[topic](driver.now()), driver.now()))
        driver.run(say.rng.choice([0, 1, 30]))
    driver.hear(driver.policy.on_message(INSTRUCTION.topic, m.Text("go"), driver.now()))
    driver.run(4000)
    assert driver.status_now()["verdict"] in ("pass", "reshape"), (driver.status_now(), driver.diagnosis())


def test_nonsense_on_every_topic_of_the_simulator() -> None:
    environment, say = make("tabletop"), Nonsense(0)
    core = SimCore(environment)
    now = Now(T0, 0, 0)
    for step in range(300):
        now = Now(T0 + step * 10 * MS, step * 10 * MS, step * 10 * MS)
        core.on_message(RESET.topic, say.text(), now)
        core.on_message(ROBOT.command_topic, m.Values(say.row(say.rng.choice([0, 8, 8]))), now)
        core.tick(now)
    core.on_message(RESET.topic, m.Text.of(episode=5000, seed=1), now)
    assert core._status["state"] == "running" and core._status["episode"] == 5000
    core.close(now)
