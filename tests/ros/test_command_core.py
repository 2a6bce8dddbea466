"""The command core, driven by plain calls on a clock of our own."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ros_nodes import messages as m
from ros_nodes import shell
from ros_nodes.command_node import build_core
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    DEADMAN,
    DIAGNOSTICS,
    EMERGENCY_STOP,
    JOINT_STATES,
    REQUEST,
    SIM_STATUS,
)
from ros_nodes.request import ChunkId, Request
from tests.ros.driver import MS, PERIOD, ROBOT, T0, Driver
from vla.runtime.gate import Reason, Verdict
from vla.runtime.trace import Trace
from vla.types import ActionChunk

ROOT = Path(__file__).resolve().parents[2]


def test_commands_come_at_the_control_rate_and_move_the_arm() -> None:
    driver = Driver().moving()
    times = np.array([t for t, _ in driver.commands()])
    assert np.all(np.diff(times)[1:] == PERIOD) and len(times) >= 18
    assert driver.status()["missed"] == 0 and driver.status()["due"] >= 16
    assert np.max(np.abs(driver.positions - np.array(ROBOT.home))) > 0.05
    assert driver.diagnosis().level == m.OK


def test_the_schedule_is_that_of_in_process_evaluation() -> None:
    from ros_nodes.graph import Graph
    from sim.evaluate import EvalConfig

    config = EvalConfig()
    assert config.scheduler == "overlapped" and config.latency_s <= config.lead * ROBOT.period_s
    for call in (build_core, Graph):
        parameters = inspect.signature(call).parameters
        assert parameters["execute"].default == config.execute and parameters["lead"].default == config.lead


def test_nothing_is_commanded_before_an_episode_or_after_its_end() -> None:
    driver = Driver()
    driver.run(500)
    assert not driver.commands()
    driver.moving()
    done = {"state": "done", "episode": 0, "success": True, "steps": 19, "family": "push"}
    driver.give(SIM_STATUS.topic, m.Text.of(**done))
    at = driver.time_ns
    driver.run(300)
    assert not driver.commands(since_ns=at) and driver.status()["phase"] == "idle"


def test_a_silent_policy_is_noticed_within_150_ms_although_actions_are_still_due() -> None:
    driver = Driver(execute=14)
    driver.moving()
    driver.run((7 - driver.time_ns // MS % 50) % 50 or 50)  # a heartbeat has just come
    driver.policy_alive, last = False, driver.time_ns
    driver.run(500)
    (stop,) = driver.core.summary()["stops"]
    assert stop["reason"] == Reason.HEARTBEAT.text and stop["silence_ms"] == 120.0
    stopped = driver.commands(since_ns=last + 119 * MS)
    assert stopped[0][0] - last <= 121 * MS  # not at the next control period: at once
    moving = np.diff([q for t, q in driver.commands() if t <= last + 119 * MS][-2:], axis=0)
    held = np.diff([q for _, q in stopped], axis=0)
    assert np.any(moving) and not np.any(held[1:])  # so slow a motion is braked within one step
    assert driver.diagnosis().level == m.ERROR and Reason.HEARTBEAT.text in driver.diagnosis().message
    assert driver.status()["queue"] > 0

    driver.policy_alive = True
    driver.run(1500)
    assert driver.status()["verdict"] in ("pass", "reshape") and driver.diagnosis().level in (m.OK, m.WARN)


def moving_again_after_ms(driver: Driver) -> int:
    """From the first heartbeat on, which comes within a period."""
    driver.run((7 - driver.time_ns // MS % 50) % 50 or 50)
    for waited in range(0, 3000, 5):
        if driver.status_now()["verdict"] in ("pass", "reshape"):
            return waited
        driver.run(5)
    raise AssertionError(driver.status())


@pytest.mark.parametrize("lost", ["nothing", "the first request"])
def test_a_policy_restarted_in_mid_episode_goes_on_at_once(lost: str) -> None:
    driver = Driver().moving()
    driver.policy_alive = False
    driver.run(3230)
    driver.pending.clear()  # what was asked of the old process
    driver.policy_alive, driver.number = True, 7 << 10
    if lost != "nothing":
        driver.lose = 1
    waited = moving_again_after_ms(driver)
    assert waited <= (120 if lost == "nothing" else 320), waited
    assert driver.status()["episode"] == 0 and not driver.status()["refused"]


@pytest.mark.parametrize("kind", ["request", "answer", "late answer"])
def test_a_lost_or_late_message_costs_no_more_than_its_chunk(kind: str) -> None:
    driver = Driver().moving()
    asked = len([s for _, s in driver.sent if s.topic == REQUEST.topic])
    driver.lose = int(kind == "request")
    driver.lose_chunks = int(kind == "answer")
    driver.answer_after_ns = 1200 * MS if kind == "late answer" else 20 * MS  # longer than a request stays open
    while len([s for _, s in driver.sent if s.topic == REQUEST.topic]) <= asked:
        driver.run(1)
    driver.answer_after_ns = 20 * MS
    driver.run(250 if kind != "late answer" else 1300)
    assert driver.status_now()["verdict"] in ("pass", "reshape")
    driver.run(1000)
    assert driver.status_now()["verdict"] in ("pass", "reshape") and not driver.status()["refused"]
    assert driver.status()["missed"] == 0 or kind == "late answer"


FAULTS = {
    "joint states stop": (lambda d: setattr(d, "joints_alive", False), Reason.JOINT_STATE_STALE),
    "a joint is lost": (
        lambda d: setattr(d, "names", (*ROBOT.command_names[:-1], "other")),
        Reason.JOINT_STATE_INVALID,
    ),
    "NaN": (lambda d: d.offset.__setitem__(2, np.nan), Reason.JOINT_STATE_INVALID),
    "the clock jumps back": (lambda d: setattr(d, "jump_ns", -3600 * 10**9), Reason.CLOCK),
    "the operator stops": (lambda d: d.give(CONTROL.topic, m.Text.of(op="stop")), Reason.OPERATOR),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_on_any_doubt_the_arm_stops_and_says_why(fault: str) -> None:
    driver = Driver().moving()
    spoil, reason = FAULTS[fault]
    spoil(driver)
    at = driver.time_ns
    driver.run(400)
    assert driver.core.summary()["stops"][-1]["reason"] == reason.text
    said = [s.message.statuses[0] for t, s in driver.sent if s.topic == DIAGNOSTICS.topic and t >= at]
    assert any(reason.text in status.message and status.level == m.ERROR for status in said)
    if fault == "the clock jumps back":  # a new time, and all is well in it: the arm came to rest and went on
        assert driver.status()["verdict"] in ("pass", "reshape")
        return
    held = [q for t, q in driver.commands(since_ns=at + 300 * MS)]
    assert held and not np.any(np.diff(held, axis=0)) and np.all(np.isfinite(held))


def stopped(driver: Driver, reason: Reason, since_ns: int, within_ms: int) -> None:
    """The arm brakes for `reason` within `within_ms` of since_ns, then holds, and /diagnostics says why."""
    stop = driver.core.summary()["stops"][-1]
    assert stop["reason"] == reason.text and stop["stamp_ns"] - T0 - since_ns <= within_ms * MS
    held = [q for _, q in driver.commands(since_ns=since_ns + 300 * MS)]
    assert held and not np.any(np.diff(held, axis=0))
    said = [s.message.statuses[0] for t, s in driver.sent if s.topic == DIAGNOSTICS.topic and t >= since_ns]
    assert any(reason.text in status.message and status.level == m.ERROR for status in said)


def goes_on(driver: Driver) -> None:
    driver.run(1500)
    assert driver.status_now()["verdict"] in ("pass", "reshape"), driver.status_now()


def test_the_emergency_stop_holds_until_it_is_released_and_resumed() -> None:
    driver = Driver().moving()
    at = driver.time_ns
    driver.give(EMERGENCY_STOP.topic, m.Flag(True))
    driver.run(500)
    stopped(driver, Reason.EMERGENCY_STOP, at, within_ms=0)
    driver.give(CONTROL.topic, m.Text.of(op="resume"))
    driver.run(300)
    assert "Release" in driver.diagnosis().values[CONTROL.topic] and driver.status()["verdict"] == "stop"
    driver.give(EMERGENCY_STOP.topic, m.Flag(False))
    driver.run(300)
    assert driver.status()["verdict"] == "stop" and "resume" in driver.diagnosis().values["estop"]
    driver.give(CONTROL.topic, m.Text.of(op="resume"))
    goes_on(driver)


def test_a_restarted_command_node_waits_for_an_emergency_stop_that_must_be_there() -> None:
    driver = Driver(estop_required=True)
    driver.run(50)
    driver.begin()
    driver.run(300)
    assert driver.status()["reason"] == Reason.EMERGENCY_STOP.text and "not heard" in driver.diagnosis().values["estop"]
    driver.give(CONTROL.topic, m.Text.of(op="resume"))  # nobody can resume what may be pressed
    assert "got nothing yet" in driver.core.refusal(CONTROL.topic)
    driver.give(EMERGENCY_STOP.topic, m.Flag(True))  # held when the node came back
    driver.run(300)
    assert driver.diagnosis().values["estop"] == "pressed" and not np.any(driver.positions - ROBOT.home)
    driver.give(EMERGENCY_STOP.topic, m.Flag(False))
    driver.run(300)
    assert driver.status()["verdict"] == "stop" and not np.any(driver.positions - ROBOT.home)
    driver.give(CONTROL.topic, m.Text.of(op="resume"))
    goes_on(driver)


def test_a_required_emergency_stop_that_says_false_lets_the_arm_move() -> None:
    driver = Driver(estop_required=True)
    driver.give(EMERGENCY_STOP.topic, m.Flag(False))
    driver.moving()
    assert "estop" not in driver.diagnosis().values


def test_while_idle_a_policy_that_is_not_there_is_a_warning() -> None:
    driver = Driver()
    driver.policy_alive = False
    driver.run(300)
    assert driver.diagnosis().level == m.WARN and "no heartbeat of a policy" in driver.diagnosis().message
    driver.policy_alive = True
    driver.run(300)
    assert driver.diagnosis().level == m.OK and driver.diagnosis().message == "ok"
    driver.policy_alive = False  # it ended before anything moved
    driver.run(400)
    assert driver.diagnosis().level == m.WARN and "no heartbeat of a policy" in driver.diagnosis().message


def test_leaving_in_motion_brakes_and_ends_the_episode() -> None:
    driver = Driver().moving()
    driver.perform(driver.core.hold(driver.now()))
    while not driver.core.held:
        driver.run(1)
    driver.perform(driver.core.leave(driver.now()))
    assert driver.status()["phase"] == "idle" and not driver.status()["success"]
    at = driver.time_ns
    driver.run(1000)  # active again
    assert not driver.commands(since_ns=at)
    driver.give(CONTROL.topic, m.Text.of(op="go", episode=1, seed=1))
    goes_on(driver)


def at_the_graph_clock(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver whose command core has its time from the shells' clock; jump_ns sets the machine's wall clock."""
    driver = Driver()
    wall = SimpleNamespace(
        monotonic_ns=lambda: driver.time_ns, time_ns=lambda: T0 + driver.time_ns + driver.jump_ns
    )  # fmt: skip
    monkeypatch.delenv(shell.CLOCK_OFFSET_VARIABLE, raising=False)
    monkeypatch.setattr(shell, "time", wall)
    clock = shell.GraphClock()
    monkeypatch.setattr(driver, "now", lambda: clock.now(driver.time_ns))
    return driver


@pytest.mark.parametrize("by_s", [3600, -3600, 0.2, -0.2])
def test_a_wall_clock_that_is_set_brakes_the_arm_once_and_it_goes_on(
    by_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = at_the_graph_clock(monkeypatch).moving()
    driver.run(12)
    driver.jump_ns, at = round(by_s * 1e9), driver.time_ns
    driver.run(2000)
    (stop,) = driver.core.summary()["stops"]
    assert stop["reason"] == Reason.CLOCK.text
    assert stop["stamp_ns"] - (T0 + driver.jump_ns) - at <= 10 * MS, "with the first message in the new time"
    assert driver.status_now()["verdict"] in ("pass", "reshape") and driver.status_now()["missed"] <= 10
    assert abs(driver.status_now()["stamp_ns"] - driver.now().stamp_ns) <= 0
    steps = np.diff([q for _, q in driver.commands(since_ns=at - 2 * PERIOD)], axis=0)
    limits = np.array([joint.max_acceleration for joint in ROBOT.joints]) * (PERIOD / 1e9) ** 2
    assert np.all(np.abs(np.diff(steps, axis=0)) <= limits + 1e-6), "a bounded brake"


def test_a_sensor_whose_machine_did_not_notice_keeps_the_arm_still(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = at_the_graph_clock(monkeypatch).moving()
    driver.joints_alive, driver.jump_ns = False, 3600 * 10**9
    for _ in range(50):
        stamp_ns = T0 + driver.time_ns
        driver.give(JOINT_STATES.topic, m.JointState(stamp_ns, driver.names, driver.positions))
        driver.run(10)
    assert driver.status_now()["verdict"] == "stop"
    driver.joints_alive = True
    goes_on(driver)


def test_garbage_on_the_emergency_stop_is_an_emergency_stop() -> None:
    driver = Driver().moving()
    at = driver.time_ns
    driver.perform(driver.core.on_reject(EMERGENCY_STOP.topic, "cut short", driver.now()))
    driver.run(500)
    stopped(driver, Reason.EMERGENCY_STOP, at, within_ms=0)
    driver.give(EMERGENCY_STOP.topic, m.Flag(False))
    driver.give(CONTROL.topic, m.Text.of(op="resume"))
    goes_on(driver)


def test_the_arm_moves_only_while_the_deadman_switch_is_held() -> None:
    driver = Driver(deadman=True)
    driver.run(50)
    driver.begin()
    driver.run(500)
    assert driver.status()["reason"] == Reason.DEADMAN.text and not np.any(driver.positions - ROBOT.home)

    def hold(milliseconds: int) -> None:
        for _ in range(milliseconds // 50):
            driver.give(DEADMAN.topic, m.Flag(True))
            driver.run(50)

    hold(1000)
    assert driver.status()["verdict"] in ("pass", "reshape")
    last = driver.time_ns
    driver.run(600)  # silence
    stopped(driver, Reason.DEADMAN, last, within_ms=150)
    hold(1000)
    assert driver.status()["verdict"] in ("pass", "reshape")
    at = driver.time_ns
    driver.give(DEADMAN.topic, m.Flag(False))
    driver.run(500)
    stopped(driver, Reason.DEADMAN, at, within_ms=0)


def test_a_second_policy_is_noticed_with_its_first_chunk_and_after_it_the_first_goes_on() -> None:
    driver = Driver().moving()
    request = [Request.read(s.message) for _, s in driver.sent if s.topic == REQUEST.topic][-1]
    at = driver.time_ns
    for _ in range(4):
        driver.chunk(request, number=(5 << 20) + driver.number)
        driver.run(200)
    assert "second policy" in driver.diagnosis().values["policies"]
    stopped(driver, Reason.SECOND_POLICY, at, within_ms=0)
    goes_on(driver)


@pytest.mark.parametrize("fault", ["a jump", "one NaN", "one without a joint"])
def test_one_bad_joint_state_between_two_periods_is_enough(fault: str) -> None:
    driver = Driver().moving()
    driver.run(12)
    at, positions, names = driver.time_ns, driver.positions.copy(), list(driver.names)
    if fault == "a jump":
        positions[1] += 0.4
    elif fault == "one NaN":
        positions[1] = np.nan
    else:
        names[1] = "other"
    driver.give(JOINT_STATES.topic, m.JointState(T0 + at, tuple(names), positions))
    driver.run(20)
    reason = Reason.JOINT_STATE_JUMP if fault == "a jump" else Reason.JOINT_STATE_INVALID
    assert driver.core.summary()["stops"][-1]["reason"] == reason.text
    assert driver.core.summary()["stops"][-1]["stamp_ns"] == T0 + at
    goes_on(driver)


@pytest.mark.parametrize("kind", ["another episode", "another request", "no id", "NaN", "other names"])
def test_a_chunk_that_does_not_fit_is_not_executed(kind: str) -> None:
    driver = Driver()
    driver.run(50)
    driver.policy_alive = False
    driver.begin()
    driver.run(300)
    request = next(Request.read(s.message) for _, s in driver.sent if s.topic == REQUEST.topic)
    before = driver.positions.copy()
    rows = np.full((16, 7), 0.005, np.float32)
    if kind == "NaN":
        rows[3, 2] = np.nan
    identity = ChunkId(
        request.episode + (kind == "another episode"), request.number + (kind == "another request"), 0
    ).text()
    names = tuple(reversed(ROBOT.action_names)) if kind == "other names" else ROBOT.action_names
    message = m.chunk_to_trajectory(
        ActionChunk(rows, T0 + driver.time_ns, 0.05), names, "" if kind == "no id" else identity
    )
    driver.give(CHUNK.topic, message)
    driver.policy_alive, driver.lose = True, 99  # alive, and never asked
    driver.run(300)
    assert driver.status()["chunks"] == 0 and np.array_equal(driver.positions, before)
    assert kind == "another episode" or driver.diagnosis().level >= m.WARN


def test_a_new_episode_starts_from_where_the_arm_stands_then() -> None:
    driver = Driver().moving()
    driver.give(SIM_STATUS.topic, m.Text.of(state="done", episode=0, success=False, steps=20))
    driver.positions = np.array(ROBOT.home) + 0.1
    driver.begin(episode=1)
    at = driver.time_ns
    driver.run(200)
    assert np.array_equal(driver.commands(since_ns=at)[0][1], np.array(ROBOT.home) + 0.1)
    requests = [Request.read(s.message) for t, s in driver.sent if s.topic == REQUEST.topic and t > at]
    assert requests[0].episode == 1 and requests[0].number == 0 and requests[0].previous == -1


def test_an_answer_within_the_period_is_executed_in_it() -> None:
    driver = Driver(execute=1, sequential=True, slot_wait_s=0.03)
    driver.answer_after_ns = 5 * MS
    driver.run(50)
    driver.begin()
    driver.run(1000)
    assert driver.status()["missed"] == 0 and driver.status()["due"] >= 15
    driver.answer_after_ns = 40 * MS  # too late for its own period: the next one has it
    driver.run(1000)
    assert driver.status()["missed"] > 5


@pytest.mark.parametrize("text", ["", "[]", '{"state":"running"}', '{"state":"running","episode":"x","seed":1}'])
def test_a_malformed_episode_or_operation_is_reported(text: str) -> None:
    driver = Driver().moving()
    driver.give(SIM_STATUS.topic, m.Text(text))
    driver.give(CONTROL.topic, m.Text('{"op":"stpo"}'))
    driver.run(300)
    assert driver.status()["verdict"] in ("pass", "reshape")
    assert "Did you mean 'stop'" in driver.diagnosis().values[CONTROL.topic]
    assert SIM_STATUS.topic in driver.diagnosis().values


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"time_limit_s": "x"}, "time_limit_s: expected seconds, 0 or more, got 'x'"),
        ({"time_limit_s": -5}, "time_limit_s: expected seconds, 0 or more, got -5"),
        ({"seed": 1.5}, "seed: expected a 64-bit integer, got 1.5"),
        ({"seed": None}, "seed: expected a 64-bit integer, got None"),
    ],
)
def test_a_go_that_cannot_be_names_the_key(more: dict[str, Any], message: str) -> None:
    driver = Driver()
    driver.run(100)
    driver.give(CONTROL.topic, m.Text.of(**({"op": "go", "episode": 1, "seed": 1} | more)))
    driver.run(300)
    assert message in driver.diagnosis().values[CONTROL.topic] and driver.status_now()["phase"] == "idle"


def test_the_trace_and_the_summary_are_saved_on_request_and_at_the_end(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "out").moving()
    driver.give(SIM_STATUS.topic, m.Text.of(state="done", episode=0, success=True, steps=20, family="push"))
    driver.give(CONTROL.topic, m.Text.of(op="save"))
    trace = Trace.load_mcap(tmp_path / "out" / "trace.mcap")
    assert [e.seed for e in trace.episodes] == [7] and trace.rows >= 18
    assert np.sum(trace.verdict[: trace.rows] == Verdict.PASS) >= 10
    (tmp_path / "out" / "control.json").unlink()
    driver.core.close(driver.now())
    saved = json.loads((tmp_path / "out" / "control.json").read_text())
    assert saved["successes"] == 1 and saved["missed_actions"] == 0 and saved["control_hz"] == pytest.approx(20, 0.02)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("command_node", ("torch", "sim", "policies", "hydra")),
        ("policy_node", ("sim", "hydra")),
        ("messages", ("cyclonedds", "torch", "mujoco")),
        ("node", ("cyclonedds", "torch", "mujoco")),
        ("sim_node", ("cyclonedds", "torch", "hydra")),
    ],
)
def test_what_a_node_does_not_import(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, ros_nodes.{module}; print([n for n in {absent!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("robot", ["tabletop", "panda"])
def test_nothing_is_imported_in_motion(robot: str) -> None:
    """numpy loads parts of itself when they are first used: with the first chunk, 24 ms of a control period."""
    script = (
        "import sys; from ros_nodes.shell import settle; from tests.ros.driver import Driver; "
        "from vla.resources import load_embodiment; "
        f"driver = Driver(robot=load_embodiment({robot!r})); driver.run(50); "
        "settle(); before = set(sys.modules); driver.begin(); driver.run(1500); "
        "assert driver.core._loop.trace.rows; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
