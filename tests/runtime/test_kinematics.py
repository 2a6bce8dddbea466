"""Kinematics of the tabletop arm: accuracy, limits, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from vla.embodiment import Embodiment
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.runtime.kinematics import Kinematics

EMBODIMENT = load_embodiment("tabletop")
HOME = np.array(EMBODIMENT.home)
LOWER = np.array([joint.lower for joint in EMBODIMENT.joints])
UPPER = np.array([joint.upper for joint in EMBODIMENT.joints])
MAX_STEP = np.array([joint.max_velocity for joint in EMBODIMENT.joints]) * EMBODIMENT.period_s


@pytest.fixture(scope="module")
def kinematics() -> Kinematics:
    return Kinematics(EMBODIMENT)


def wander(kinematics: Kinematics, steps: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(action, reference, solution) along a walk between random points of the working area, at cruise speed."""
    rng = np.random.default_rng(seed)
    q, goal, out = HOME.copy(), kinematics.forward(HOME)[0], []
    for _ in range(steps):
        position, _ = kinematics.forward(q)
        if np.linalg.norm(goal - position) < 0.005:
            goal = rng.uniform([0.36, -0.27, 0.015], [0.68, 0.27, 0.24])
        move = goal - position
        move *= min(1.0, 0.021 / max(1e-9, float(np.linalg.norm(move))))
        action = np.concatenate([move, np.zeros(3), [rng.choice([-1.0, 1.0])]])
        out.append((action, q, kinematics.solve(action, q)))
        q = out[-1][2]
    return out


def test_home_is_upright_and_where_the_embodiment_says(kinematics: Kinematics) -> None:
    position, rotation = kinematics.forward(HOME)
    assert np.allclose(position, [0.50, 0.0, 0.20], atol=1e-3)
    assert np.allclose(rotation, np.eye(3), atol=1e-3)
    assert np.all(position > EMBODIMENT.workspace_lower) and np.all(position < EMBODIMENT.workspace_upper)


def test_translations_arrive_and_the_tool_stays_upright(kinematics: Kinematics) -> None:
    walk = wander(kinematics, 400, seed=0)
    for action, reference, solution in walk:
        moved = kinematics.forward(solution)[0] - kinematics.forward(reference)[0]
        assert np.linalg.norm(moved - action[:3]) < 2e-4
    assert np.linalg.norm(kinematics.state(walk[-1][2])[3:6]) < 0.01  # nothing accumulates over 400 steps


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotations_turn_about_the_axes_of_the_base(kinematics: Kinematics, axis: int) -> None:
    action = np.zeros(7)
    action[3 + axis] = 0.05
    position, rotation = kinematics.forward(HOME)
    after, turned = kinematics.forward(kinematics.solve(action, HOME))
    assert np.allclose(after, position, atol=2e-4)
    step = turned @ rotation.T
    rotvec = 0.5 * np.array([step[2, 1] - step[1, 2], step[0, 2] - step[2, 0], step[1, 0] - step[0, 1]])
    assert np.allclose(rotvec, action[3:6], atol=1e-3)


def test_solutions_keep_position_and_velocity_limits(kinematics: Kinematics) -> None:
    rng = np.random.default_rng(1)
    q = HOME.copy()
    for _ in range(300):  # far beyond what is reachable, singular poses included
        action = np.concatenate([rng.normal(0, 0.2, 3), rng.normal(0, 0.5, 3), rng.uniform(-3, 3, 1)])
        solution = kinematics.solve(action, q)
        assert np.all(np.isfinite(solution))
        assert np.all(solution >= LOWER) and np.all(solution <= UPPER)
        assert np.all(np.abs(solution - q) <= MAX_STEP + 1e-9)
        q = solution


def test_stretched_out_it_goes_as_far_as_it_can(kinematics: Kinematics) -> None:
    q, outward = HOME.copy(), np.array([0.03, 0, 0, 0, 0, 0, 1.0])
    for _ in range(60):
        q = kinematics.solve(outward, q)
        assert np.all(np.isfinite(q))
    assert kinematics.forward(q)[0][0] > 0.72


def test_gripper_maps_both_ends_and_keeps_its_speed(kinematics: Kinematics) -> None:
    close, hold = np.array([0, 0, 0, 0, 0, 0, -1.0]), np.array([0, 0, 0, 0, 0, 0, 1.0])
    q = kinematics.solve(close, HOME)
    assert HOME[-1] - MAX_STEP[-1] < q[-1] < HOME[-1]
    assert np.array_equal(q[:-1], HOME[:-1])
    for _ in range(10):
        q = kinematics.solve(close, q)
    assert q[-1] == 0.0
    for _ in range(10):
        q = kinematics.solve(hold, q)
    assert q[-1] == pytest.approx(0.08)


def test_no_state_is_left_between_calls(kinematics: Kinematics) -> None:
    walk = wander(kinematics, 20, seed=3)
    for action, reference, solution in reversed(walk):
        assert np.array_equal(kinematics.solve(action, reference), solution)


def test_state_follows_the_names(kinematics: Kinematics) -> None:
    state = kinematics.state(HOME)
    assert state.dtype == np.float32 and state.shape == (EMBODIMENT.state_dim,)
    assert np.allclose(state, [0.50, 0, 0.20, 0, 0, 0, 0.08], atol=1e-3)


def test_joint_position_actions_pass_through() -> None:
    data = EMBODIMENT.to_dict()
    names = [joint.name for joint in EMBODIMENT.joints]
    data |= {"action_space": "joint_position", "action_names": names, "action_units": ["rad"] * 7 + ["m"]}
    arm = Kinematics(Embodiment.from_dict(data))
    wanted = HOME + 0.01
    assert np.array_equal(arm.solve(wanted, HOME), np.clip(wanted, LOWER, UPPER))


@pytest.mark.parametrize(
    ("action", "reference", "words"),
    [
        (np.full(7, np.nan), HOME, "action: expected finite"),
        (np.zeros(6), HOME, r"action: expected \[7\] values"),
        (np.zeros(7), HOME[:7], r"reference: expected \[8\] values"),
        (np.zeros(7), np.full(8, np.inf), "reference: expected finite"),
    ],
)
def test_bad_input_is_refused(kinematics: Kinematics, action: np.ndarray, reference: np.ndarray, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kinematics.solve(action, reference)


def test_a_misspelt_site_offers_the_nearest_one() -> None:
    data = EMBODIMENT.to_dict() | {"tool_site": "tol"}
    with pytest.raises(ConfigError, match="Did you mean 'tool'"):
        Kinematics(Embodiment.from_dict(data))
