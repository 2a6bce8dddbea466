"""Embodiments: what differs is refused by name, all of it at once; what is written in files is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla.embodiment import Camera, Embodiment, Joint, JointSource, Output
from vla.errors import ConfigError, EmbodimentMismatch, ObservationError
from vla.resources import bundle_path, config_dir, embodiment_names, load_embodiment, robot_model
from vla.runtime.limits import JointLimits
from vla.types import ActionChunk, ControlMode, Observation, check_instruction

ROBOT = load_embodiment("tabletop")
# field of the message -> the change that makes it differ
DIFFERENCES: dict[str, dict[str, Any]] = {
    "camera_names": {"cameras": tuple(reversed(ROBOT.cameras))},
    "action_names": {"action_names": tuple(reversed(ROBOT.action_names))},
    "action_units": {"action_units": ("mm", *ROBOT.action_units[1:])},
    "state_names": {"state_names": tuple(reversed(ROBOT.state_names))},
    "rotation_format": {"rotation_format": "euler_xyz"},
    "gripper_open": {"gripper_open": -1},
    "rate_hz": {"rate_hz": 10.0},
    "action_space": {"action_space": "joint_position"},
    "control_mode": {"control_mode": ControlMode.OSC_DELTA},
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_each_difference_is_named_with_both_sides(field: str) -> None:
    other = replace(ROBOT, **DIFFERENCES[field])
    (line,) = ROBOT.differences(other)
    assert line.startswith(f"{field}: ") and " != " in line
    assert other.differences(ROBOT)[0] != line
    with pytest.raises(EmbodimentMismatch, match=rf"robot and policy: 1 difference.*{field}: .*made for this robot"):
        ROBOT.require_same(other, "robot and policy")


def test_all_differences_are_named_at_once() -> None:
    other = replace(ROBOT, **{key: value for change in DIFFERENCES.values() for key, value in change.items()})
    with pytest.raises(EmbodimentMismatch) as caught:
        ROBOT.require_same(other, "robot and policy")
    assert all(f"{field}: " in str(caught.value) for field in DIFFERENCES)
    assert f"{len(DIFFERENCES)} difference(s)" in str(caught.value)


def test_what_a_policy_does_not_see_may_differ() -> None:
    ROBOT.require_same(replace(ROBOT, name="another", command_topic="/other", max_tool_speed_m_s=0.1), "two arms")


@pytest.mark.parametrize("name", embodiment_names())
def test_plain_data_rebuilds_the_same(name: str) -> None:
    robot = load_embodiment(name)
    assert Embodiment.from_dict(json.loads(json.dumps(robot.to_dict()))) == robot


def test_the_shipped_bundle_still_means_the_same_robot() -> None:
    stored = json.loads((bundle_path("tabletop") / "bundle.json").read_text())["embodiment"]
    old = Embodiment.from_dict(stored)
    assert old == ROBOT and stored == json.loads(json.dumps(ROBOT.to_dict())), "written as ever, read as ever"
    old.require_same(ROBOT, "the bundle and the robot")
    assert JointLimits.of(old).jerk is None and old.max_time_scale == 1.0
    assert old.sinks == (Output("/joint_commands"),)


@pytest.mark.parametrize("name", ["panda", "ur5e", "so100", "so101", "aloha"])
def test_a_described_robot_is_complete(name: str) -> None:
    robot = load_embodiment(name)
    limits, home = JointLimits.of(robot), np.array(robot.home)
    assert limits.jerk is not None and robot.max_time_scale > 1
    assert np.all(home >= limits.lower) and np.all(home <= limits.upper)
    assert robot.action_dim == len(robot.joints) and robot.cameras and all(camera.topic for camera in robot.cameras)
    assert robot.state_is_joints
    np.testing.assert_array_equal(robot.joint_state_vector(home), home.astype(np.float32))
    # Full acceleration is reached within a few periods and well before full speed: neither limit is an afterthought.
    assert np.all(limits.acceleration / limits.jerk < 5 * robot.period_s)
    assert len(robot.grippers) == len(robot.gripper_joints) == {"ur5e": 0, "aloha": 2}.get(name, 1)
    text = (config_dir() / "embodiment" / f"{name}.yaml").read_text()
    assert "Sources:" in text, "every value says where it is from"


PARTS = (Output("/arm", "trajectory", ("joint1", "joint2")), Output("/hand", "gripper_command", ("gripper",)))
SMALL = replace(ROBOT, joints=(ROBOT.joints[0], ROBOT.joints[1], ROBOT.joints[7]))


def test_outputs_cover_every_joint_once() -> None:
    robot = replace(SMALL, outputs=PARTS)
    assert robot.sinks == PARTS and Embodiment.from_dict(robot.to_dict()) == robot


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (PARTS[:1], "none for \\['gripper'\\]"),
        ((*PARTS, Output("/more", "positions", ("joint1",))), "two for \\['joint1'\\]"),
        ((Output("/arm", "position"),), "Did you mean 'positions'"),
        ((Output("/arm", "positions", ("joint1", "joint3", "gripper")),), "'joint3' is no joint"),
        ((Output("/arm", "velocities"),), "timeout_s.*the driver stops by itself"),
        ((Output("/arm", "gripper_command"),), "expected one joint"),
        ((Output("/arm", names=("a",)),), "expected 0 names"),
    ],
)
def test_outputs_that_cannot_be_right_are_refused(outputs: tuple[Output, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, outputs=outputs)
    with pytest.raises(ConfigError, match="max_time_scale"):
        replace(SMALL, max_time_scale=0.5)


SOURCES = (JointSource("/arm", ("joint1", "joint2"), ("j1", "j2")), JointSource("/hand", ("gripper",)))


def test_joint_states_cover_every_joint_once() -> None:
    robot = replace(SMALL, joint_states=SOURCES)
    assert robot.joint_sources == SOURCES and Embodiment.from_dict(robot.to_dict()) == robot
    assert SMALL.joint_sources == (JointSource("/joint_states"),) and "joint_states" not in SMALL.to_dict()
    SMALL.require_same(robot, "a policy sees no topics")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (SOURCES[:1], r"joint_states: expected one source for every joint, got none for \['gripper'\]"),
        ((*SOURCES, JointSource("/more", ("joint1",))), r"joint_states: .*two for \['joint1'\]"),
        ((*SOURCES[:1], JointSource("/hand", ("griper",))), r"joint_states\[/hand\].joints: 'griper'.*'gripper'"),
        ((JointSource("/arm", ("joint1", "joint2"), ("j1",)), SOURCES[1]), r"joint_states\[/arm\].names: expected 2"),
        ((JointSource("/arm", ("joint1", "joint2"), ("j", "j")), SOURCES[1]), r"\[/arm\].names: expected each once"),
        ((JointSource("/arm", ("joint1", "joint2")), JointSource("/arm", ("gripper",))), "every topic once"),
    ],
)
def test_joint_states_that_cannot_be_right_are_refused(sources: tuple[JointSource, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, joint_states=sources)


def test_velocities_are_sent_to_a_driver_that_stops_by_itself() -> None:
    assert replace(SMALL, outputs=(Output("/arm", "velocities", timeout_s=0.1),)).sinks[0].timeout_s == 0.1


def test_jerk_is_limited_for_all_joints_or_for_none() -> None:
    joints = (Joint("a", -1, 1, 1, 1, 10.0), Joint("b", -1, 1, 1, 1))
    with pytest.raises(ConfigError, match=r"every joint, or for none.*\['b'\]"):
        JointLimits.of(replace(ROBOT, joints=joints))
    with pytest.raises(ConfigError, match=r"b\.max_jerk: expected a positive number"):
        JointLimits.of(replace(ROBOT, joints=(joints[0], replace(joints[1], max_jerk=0.0))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate_hs": 20}, "Did you mean 'rate_hz'"),
        ({"action_space": "ee_detla"}, "Did you mean 'ee_delta'"),
        ({"rotation_format": "axis-angle"}, "Did you mean 'axis_angle'"),
        ({"control_mode": "joint_positions"}, "Did you mean 'joint_position'"),
        ({"gripper_open": 0}, r"gripper_open: expected \+1 or -1"),
        ({"rate_hz": 0.0}, "rate_hz: expected a positive rate"),
        ({"action_units": ["m"]}, "action_units: expected 7 entries"),
        ({"cameras": [{"name": "agentview", "heigth": 128, "width": 128}]}, "Did you mean 'height'"),
        ({"cameras": [{"name": "agentview", "width": 128}]}, "height"),
        ({"joint_states": [{"topics": "/a"}]}, "Did you mean 'topic'"),
    ],
)
def test_wrong_files_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Embodiment.from_dict(ROBOT.to_dict() | change)


def test_a_missing_key_is_named() -> None:
    data = ROBOT.to_dict()
    del data["state_names"]
    with pytest.raises(ConfigError, match="state_names"):
        Embodiment.from_dict(data)


def test_an_unknown_camera_offers_the_nearest() -> None:
    assert ROBOT.camera("wrist").topic == "/camera/wrist/image_raw"
    with pytest.raises(ConfigError, match="Did you mean 'wrist'"):
        ROBOT.camera("wirst")


def test_stop_holds_where_the_arm_is_and_does_not_share_memory() -> None:
    positions = np.array(ROBOT.home)
    stop = ROBOT.stop(positions, 5)
    np.testing.assert_array_equal(stop.values, positions)
    positions += 1
    assert not np.array_equal(stop.values, positions) and stop.stamp_ns == 5
    with pytest.raises(ConfigError, match="positions: expected 8"):
        ROBOT.stop(positions[:3])
    osc = replace(ROBOT, control_mode=ControlMode.OSC_DELTA, cameras=(Camera("a", 8, 8),))
    assert not osc.stop().values.any()


def test_due_times_of_a_chunk() -> None:
    chunk = ActionChunk(np.zeros((4, 7), np.float32), 1_000, 0.05)
    assert len(chunk) == 4 and chunk.due_ns(2) == 1_000 + 100_000_000 and chunk.end_ns == 1_000 + 200_000_000
    with pytest.raises(ObservationError, match="T >= 1"):
        ActionChunk(np.zeros((0, 7), np.float32), 0, 0.05)


def test_instructions_and_states_that_cannot_be_used() -> None:
    assert check_instruction("  push the cube \n") == "push the cube"
    assert len(check_instruction("x" * 1000)) == 1000
    for text, words in (("", "empty text"), (" \n\t", "empty text"), ("x" * 10_000, "10000 characters")):
        with pytest.raises(ObservationError, match=words):
            check_instruction(text)
        with pytest.raises(ObservationError, match=words):
            Observation({}, np.zeros(7, np.float32), text, 0).check()
    with pytest.raises(ObservationError, match=r"NaN or infinity at index \[1, 3\]"):
        Observation({}, np.array([0, np.nan, 0, np.inf]), "push", 0).check()


def test_a_model_lies_beside_the_users_own_file(tmp_path) -> None:
    text = (config_dir() / "embodiment" / "panda.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text + "robot_model: arm.urdf\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="robot_model: expected an existing file"):
        robot_model(load_embodiment(tmp_path / "mine.yaml"))
    (tmp_path / "arm.urdf").write_text("<robot name='arm'/>")
    assert robot_model(load_embodiment(tmp_path / "mine.yaml")) == (tmp_path / "arm.urdf").resolve()
    assert load_embodiment("tabletop").robot_model == "tabletop_arm.xml"
