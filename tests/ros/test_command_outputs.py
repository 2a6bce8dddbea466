"""What the driver takes: trajectories that end at rest, goals, velocities, chunks that are slowed down."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ros_nodes import messages as m
from ros_nodes.command_node import CommandCore
from ros_nodes.node import (
    CONTROL,
    REQUEST,
)
from ros_nodes.request import Request
from tests.ros.driver import MS, PERIOD, ROBOT, Driver
from vla.embodiment import Embodiment, Output
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.runtime.gate import Reason

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


def test_velocities_are_zero_once_the_arm_is_stopped() -> None:
    names = tuple(f"drive_{name}" for name in ROBOT.command_names)
    driver = Driver(robot=with_outputs(Output("/velocity", "velocities", ROBOT.command_names, names, timeout_s=0.1)))
    driver.run(50)
    driver.begin()
    for _ in range(1000):  # an arm that follows its velocities
        driver.run(1)
        driver.positions = driver.core._loop.gate.command
    moving = [s.message.data for _, s in driver.sent if s.topic == "/velocity"]
    assert np.any(moving[-1])
    driver.give(CONTROL.topic, m.Text.of(op="stop"))
    driver.run(500)
    assert not np.any([s.message.data for _, s in driver.sent if s.topic == "/velocity"][-1])


def test_actions_need_a_shell_that_has_them() -> None:
    from ros_nodes.command_node import main

    with pytest.raises(ConfigError, match="need rclpy"):
        main(["--embodiment", "panda"])


def test_the_output_can_be_chosen_on_the_command_line() -> None:
    from ros_nodes import settings
    from ros_nodes.command_node import build

    def made(**values: Any) -> CommandCore:
        return build(settings.options(settings.COMMAND, values))

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
