"""The rules by which streams become samples, and commands become actions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.data import resample
from vla.data.actions import Commands, Sent, actions_of
from vla.data.resample import NEVER, Gap, Rules
from vla.errors import ConfigError
from vla.resources import load_embodiment

MS = 1_000_000
RULES = Rules(20.0)
TIMES = np.array([100, 150, 200], np.int64) * MS
T0 = 1_700_000_000_000_000_000


def test_the_last_sample_leaves_a_whole_period() -> None:
    assert np.array_equal(resample.sample_times(100 * MS, 250 * MS, RULES), TIMES)
    assert np.array_equal(resample.sample_times(100 * MS, 250 * MS - 1, RULES), TIMES[:2])
    assert len(resample.sample_times(100, 50, RULES)) == 0
    for bad in ({"rate_hz": 0.0}, {"rate_hz": 20.0, "image_slop_s": -1.0}, {"rate_hz": float("nan")}):
        with pytest.raises(ConfigError):
            Rules(**bad)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30, unique=True), st.integers(1, 150))
def test_an_image_is_the_latest_that_is_not_later_and_never_too_old(milliseconds: list[int], slop_ms: int) -> None:
    stamps = np.array(sorted(milliseconds), np.int64) * MS
    rules = Rules(20.0, image_slop_s=slop_ms / 1e3)
    places = resample.images("front", stamps, TIMES, rules)
    best = [max((s for s in stamps if s <= t), default=None) for t in TIMES]
    if any(s is None or t - s > slop_ms * MS for s, t in zip(best, TIMES)):
        assert isinstance(places, Gap) and places.stream == "front" and places.at_ns in TIMES
    else:
        assert isinstance(places, np.ndarray) and stamps[places].tolist() == best


def test_states_are_linear_between_neighbours_and_exact_on_them() -> None:
    stamps = T0 + np.array([100, 140, 160, 200], np.int64) * MS
    values = np.array([[0.1, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 1.0, 0.0], [1.3, 1.0, 0.0]])
    found = resample.states("joints", stamps, values, T0 + TIMES, RULES, np.array([False, True, False]))
    assert np.array_equal(found[[0, 2]], values[[0, 3]])  # bit for bit, also for nanoseconds since the epoch
    assert found[1] == pytest.approx([0.7, 1.0, 0.0])  # the gripper takes the later of two equally near ones


def test_states_are_not_extrapolated_nor_drawn_over_holes() -> None:
    values = np.zeros((2, 1))
    for stamps, at in (([101, 250], 100), ([90, 190], 200), ([90, 191], 100), ([], 100)):
        gap = resample.states("joints", np.array(stamps, np.int64) * MS, values[: len(stamps)], TIMES, RULES)
        assert isinstance(gap, Gap) and gap.at_ns == at * MS and (gap.age_ns == NEVER) == (not stamps)
    assert not isinstance(resample.states("j", np.array([100, 200]) * MS, values, TIMES, RULES), Gap)


def test_a_rotation_vector_never_passes_through_rotations_that_never_were() -> None:
    stamps = np.array([100, 200], np.int64) * MS
    values = np.array([[3.1, 0.0, 0.0], [-3.1, 0.0, 0.0]])  # 5 degrees apart, a turn between their numbers
    rotation = np.ones(3, bool)
    found = resample.states("state", stamps, values, TIMES, RULES, rotation=rotation)
    assert set(found[:, 0].tolist()) == {3.1, -3.1}
    values[1] = [3.0, 0.0, 0.1]
    assert resample.states("state", stamps, values, TIMES, RULES, rotation=rotation)[1] == pytest.approx(
        [3.05, 0, 0.05]
    )


def test_a_command_is_in_force_until_the_next_one() -> None:
    def step(ms: int, value: float) -> Sent:
        return Sent(T0 + ms * MS, np.array([T0 + ms * MS]), np.array([[value]]))

    commands = Commands([step(150, 2.0), step(100, 1.0), step(160, 3.0)])
    assert commands.before(T0 + np.array([101, 150, 151, 160, 500]) * MS)[:, 0].tolist() == [1, 1, 2, 2, 3]
    assert commands.since(T0 + 150 * MS).stamps.tolist() == [T0 + 150 * MS, T0 + 160 * MS]
    way = Sent(T0, T0 + np.array([0, 100, 200]) * MS, np.array([[0.0], [1.0], [1.0]]))
    assert Commands([way]).before(T0 + np.array([25, 100, 900]) * MS)[:, 0] == pytest.approx([0.25, 1, 1])


def test_end_effector_actions_come_back_from_joint_commands() -> None:
    """Through the solver of the control loop and back: the same actions, the gripper's goal included."""
    from vla.runtime.kinematics import Kinematics

    robot = load_embodiment("tabletop")
    kinematics = Kinematics(robot)
    rng = np.random.default_rng(0)
    asked = np.zeros((12, 7))
    asked[:, :3] = rng.uniform(-0.012, 0.012, (12, 3))
    asked[:, 3:6] = rng.uniform(-0.03, 0.03, (12, 3))
    asked[:, 6] = [1, 1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1]
    commanded = [np.array(robot.home)]
    for action in asked:
        commanded.append(kinematics.solve(action, commanded[-1]))
    said = actions_of(robot, np.stack(commanded[:-1]), np.stack(commanded[1:]), kinematics.forward)
    assert np.abs(said[:, :3] - asked[:, :3]).max() < 5e-5 and np.abs(said[:, 3:6] - asked[:, 3:6]).max() < 2e-4
    assert np.array_equal(np.sign(said[:, 6]), asked[:, 6]) and np.abs(said[:, 6]).min() > 0.7


def test_what_cannot_be_told_from_commands_is_refused() -> None:
    import dataclasses

    robot = load_embodiment("tabletop")
    one = np.zeros((1, 8))
    with pytest.raises(ConfigError, match="with a model"):
        actions_of(robot, one, one)
    with pytest.raises(ConfigError, match="one per command"):
        actions_of(dataclasses.replace(robot, action_space="joint_position"), one, one)
