"""What the command core sends when an episode ends or begins in motion, and to an arm that does not follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from driver import MS, PERIOD, ROBOT, Driver

from ros_nodes import messages as m
from ros_nodes.node import CONTROL
from vla.embodiment import Embodiment, Output
from vla.runtime.gate import Reason

KINDS = ("positions", "velocities")
ACCELERATION = np.array([joint.max_acceleration for joint in ROBOT.joints])


def robot_of(kind: str) -> Embodiment:
    return replace(ROBOT, outputs=(Output(ROBOT.command_topic, kind, timeout_s=0.1),))


def velocities(driver: Driver, kind: str, since_ns: int) -> np.ndarray:
    """float64[N, D], of the commands since then, the one before included."""
    commands = [values for _, values in driver.commands(since_ns=since_ns - PERIOD - MS)]
    return np.array(commands) if kind == "velocities" else np.diff(commands, axis=0) / ROBOT.period_s


def check(driver: Driver, kind: str, since_ns: int) -> np.ndarray:
    found = velocities(driver, kind, since_ns)
    assert np.all(np.abs(np.diff(found, axis=0)) <= ACCELERATION * ROBOT.period_s + 1e-6), "braked within the limits"
    times = np.diff([at for at, _ in driver.commands(since_ns=since_ns - PERIOD - MS)])
    assert np.all(times >= PERIOD // 2), "no two commands in one period"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_done_in_motion_brakes_before_the_stream_ends(kind: str) -> None:
    driver = Driver(robot=robot_of(kind)).moving()
    at = driver.time_ns
    assert np.any(np.abs(velocities(driver, kind, at - 2 * PERIOD)[-1]) > 0.05)
    driver.give(CONTROL.topic, m.Text.of(op="done", success=True))
    assert driver.status()["phase"] == "ending" and driver.status()["success"]
    driver.run(1000)
    found = check(driver, kind, at)
    assert not np.any(found[-1]) and driver.status()["phase"] == "idle"
    ended = driver.time_ns
    driver.run(300)
    assert not driver.commands(since_ns=ended)


@pytest.mark.parametrize("kind", KINDS)
def test_go_in_motion_brakes_before_the_next_episode_begins(kind: str) -> None:
    driver = Driver(robot=robot_of(kind)).moving()
    at = driver.time_ns
    driver.give(CONTROL.topic, m.Text.of(op="go", episode=9, seed=1))
    assert driver.status()["phase"] == "ending" and driver.status()["episode"] == 9
    driver.run(2000)
    found = check(driver, kind, at)
    still = np.flatnonzero(~np.any(found, axis=1))
    assert len(still) and np.any(found[still[0] :]), "at rest, then on"
    assert driver.status()["episode"] == 9 and driver.status()["phase"] == "running"


def test_done_while_an_episode_waits_for_the_arm_to_rest_takes_it_back() -> None:
    driver = Driver().moving()
    driver.give(CONTROL.topic, m.Text.of(op="go", episode=9, seed=1))
    driver.give(CONTROL.topic, m.Text.of(op="done"))
    driver.run(1000)
    assert driver.status()["phase"] == "idle" and driver.status()["episode"] == 0


def test_a_time_limit_ends_an_episode_like_done() -> None:
    driver = Driver()
    driver.run(50)
    driver.give(CONTROL.topic, m.Text.of(op="go", episode=3, seed=1, time_limit_s=1.0))
    driver.run(900)
    assert driver.status()["phase"] == "running"
    driver.run(1100)
    assert driver.status()["phase"] == "idle" and not driver.status()["success"]
    assert not np.any(velocities(driver, "positions", 0)[-1])


def test_an_arm_that_does_not_follow_is_named_and_does_not_leap_when_it_does() -> None:
    driver = Driver().moving()
    driver.follows, stood = False, driver.positions.copy()
    furthest = 0.0
    for _ in range(60):
        driver.run(50)
        furthest = max(furthest, float(np.max(np.abs(driver.commands()[-1][1] - stood))))
        if driver.diagnosis().message == Reason.TRACKING.text:
            break
    assert driver.diagnosis().message == Reason.TRACKING.text and driver.diagnosis().level == m.ERROR
    driver.lose = 99  # no newer chunk: held
    driver.run(3000)
    assert np.max(np.abs(driver.commands()[-1][1] - stood)[: len(ROBOT.joints) - 1]) < 1e-3 < 0.1 < furthest < 0.5
    driver.follows, driver.lose = True, 0
    driver.run(1000)
    assert driver.status()["verdict"] in ("pass", "reshape")


def test_how_far_an_arm_may_be_off_is_a_setting() -> None:
    driver = Driver(max_tracking_error=0.01).moving()
    driver.follows = False
    driver.run(600)
    assert driver.diagnosis().message == Reason.TRACKING.text
