"""Limits and kinematics from a robot's own description file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arms import arm

from vla.embodiment import Joint
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.runtime.kinematics import Kinematics
from vla.runtime.limits import JointLimits, urdf_limits, within_urdf
from vla.runtime.loop import control_loop
from vla.runtime.scheduler import OverlappedScheduler

LINK = '<link name="{}"><visual><geometry><mesh filename="package://none/x.stl"/></geometry></visual></link>'
URDF = f"""<?xml version="1.0"?>
<robot name="two_links">
  {LINK.format("base")} {LINK.format("upper")} {LINK.format("lower")} {LINK.format("tip")} {LINK.format("jaw")}
  <joint name="joint1" type="revolute">
    <parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
    <limit lower="-0.8" upper="2.0" effort="1" velocity="5"/>
  </joint>
  <joint name="joint2" type="continuous">
    <parent link="upper"/><child link="lower"/><origin xyz="0.4 0 0"/><axis xyz="0 0 1"/>
    <limit effort="1" velocity="0.5"/>
  </joint>
  <joint name="tip_joint" type="fixed"><parent link="lower"/><child link="tip"/><origin xyz="0.3 0 0"/></joint>
  <joint name="joint3" type="prismatic">
    <parent link="lower"/><child link="jaw"/><axis xyz="0 1 0"/><limit lower="0" upper="0.5" effort="1"/>
  </joint>
</robot>
"""
JOINTS = (Joint("joint1", -1, 1, 1, 4), Joint("joint2", -2, 2, 1, 4), Joint("joint3", 0, 3, 0.5, 1))


@pytest.fixture
def urdf(tmp_path: Path) -> Path:
    path = tmp_path / "two_links.urdf"
    path.write_text(URDF)
    return path


def test_limits_are_read_as_they_are_stated(urdf: Path) -> None:
    assert urdf_limits(urdf) == {
        "joint1": (-0.8, 2.0, 5.0), "joint2": (-np.inf, np.inf, 0.5), "joint3": (0.0, 0.5, np.inf),
    }  # fmt: skip


def test_the_stricter_limit_wins_on_either_side(urdf: Path) -> None:
    robot = within_urdf(arm("joint_position", joints=JOINTS), urdf)
    got = [(j.lower, j.upper, j.max_velocity, j.max_acceleration) for j in robot.joints]
    assert got == [(-0.8, 1, 1, 4), (-2, 2, 0.5, 4), (0, 0.5, 0.5, 1)]
    assert within_urdf(robot) is robot, "no URDF, no change"


def test_the_control_loop_keeps_the_limits_of_the_urdf(urdf: Path) -> None:
    robot = arm(
        "joint_position", joints=JOINTS, urdf=str(urdf), action_names=("a", "b", "c"), action_units=("rad",) * 3
    )
    loop = control_loop(robot, OverlappedScheduler())
    assert [joint.max_velocity for joint in loop.embodiment.joints] == [1, 0.5, 0.5]
    robot.require_same(loop.embodiment, "robot and loop")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (URDF.replace('name="joint2"', 'name="joint_2"'), "Did you mean 'joint_2'"),
        (URDF.replace('<limit lower="-0.8" upper="2.0" effort="1" velocity="5"/>', ""), "joint1.*expected a <limit>"),
        (URDF.replace('lower="-0.8"', 'lower="${pi}"'), "Expand xacro"),
        (URDF.replace('lower="-0.8" upper="2.0"', 'lower="1.5" upper="2.0"'), "limits of joint1.*overlap"),
        (URDF.replace("</robot>", ""), "readable URDF"),
        ("<mujoco/>", "expected a <robot>"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.urdf"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        within_urdf(arm("joint_position", joints=JOINTS), path)


def test_kinematics_need_no_meshes_and_find_a_link_behind_a_fixed_joint(urdf: Path) -> None:
    robot = arm("ee_delta", joints=JOINTS[:2], robot_model=str(urdf), tool_site="tip", home=(0.0, 0.0))
    position, _ = Kinematics(robot).forward(np.array([0.3, -0.1]))
    expected = 0.4 * np.array([np.cos(0.3), np.sin(0.3)]) + 0.3 * np.array([np.cos(0.2), np.sin(0.2)])
    np.testing.assert_allclose(position[:2], expected, atol=1e-9)
    with pytest.raises(ConfigError, match=r"no site or body 'tipp'.*Did you mean 'tip'"):
        Kinematics(replace(robot, tool_site="tipp"))
    urdf.write_text("<robot>")
    with pytest.raises(ConfigError, match="robot_model"):
        Kinematics(robot)


def test_a_path_is_what_the_actions_ask_for_at_whatever_speed() -> None:
    kinematics = Kinematics(load_embodiment("tabletop"))
    home = np.array(kinematics.embodiment.home)
    deltas = np.zeros((4, 7))
    deltas[:, 1], deltas[:, 6] = 0.05, 1.0  # 1 m/s
    path = kinematics.path(deltas, home)
    for k, q in enumerate(path, 1):
        moved = kinematics.forward(q)[0] - kinematics.forward(home)[0]
        np.testing.assert_allclose(moved, [0, 0.05 * k, 0], atol=1e-3)
    held = kinematics.solve(np.array([0, 0.3, 0, 0, 0, 0, 1.0]), home)
    limits = JointLimits.of(kinematics.embodiment)
    assert np.all(np.abs(held - home) <= limits.velocity * 0.05 + 1e-12), "solve keeps the speed limits"
