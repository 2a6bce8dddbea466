"""The tabletop's tasks, its expert and the language-swap control. What every environment shares is in contracts/."""

from __future__ import annotations

import ctypes.util
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from sim.environment import make
from sim.tabletop import rendering, tasks
from sim.tabletop.environment import TabletopEnvironment
from sim.tabletop.expert import Expert
from sim.tabletop.scene import HALF_WIDTH_M
from vla.errors import ConfigError, ObservationError, SimulationError
from vla.types import Command, ControlMode


@pytest.fixture(scope="module")
def environment() -> Iterator[TabletopEnvironment]:
    made = TabletopEnvironment()
    yield made
    made.close()


def run_expert(
    environment: TabletopEnvironment, seed: int, noise: float = 0.0, **options: object
) -> tuple[bool, int, dict, np.ndarray]:
    """(success, steps, last info, actions [T, A]) of one episode through kinematics, without looking at any image."""
    observation, info = environment.reset(seed=seed, options=dict(options))
    expert, reference, rng = Expert(environment), environment.joint_state()[1], np.random.default_rng(seed)
    actions = []
    for step in itertools.count(1):
        actions.append(expert.action())
        executed = actions[-1] + (expert.noise(rng, noise) if noise else 0.0)
        reference = environment.kinematics.solve(executed, reference)
        command = Command(ControlMode.JOINT_POSITION, reference, observation.stamp_ns)
        observation, _, terminated, truncated, info = environment.step(command)
        if terminated or truncated:
            return terminated, step, info, np.array(actions)
    raise AssertionError


# ---- expert ----
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_expert_succeeds_and_moves_what_it_was_told_to(environment: TabletopEnvironment, family: str) -> None:
    for seed in range(6):
        success, steps, info, actions = run_expert(environment, seed, task=family)
        assert success and steps < 80, seed
        assert info["moved"] == info["object"] and info["family"] == family
        assert np.all(actions[:, 3:6] == 0.0)  # upright all the way: rotations cost a tokenizer nothing
        assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_expert_recovers_from_disturbances(environment: TabletopEnvironment, family: str) -> None:
    assert sum(run_expert(environment, seed, noise=0.3, task=family)[0] for seed in range(100, 105)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_expert_reaches_98_percent(environment: TabletopEnvironment, family: str) -> None:
    assert sum(run_expert(environment, seed, task=family)[0] for seed in range(200)) >= 196
    assert sum(run_expert(environment, seed, noise=0.3, task=family)[0] for seed in range(200)) >= 190


@pytest.mark.parametrize("rate_hz", [5.0, 15.0, 50.0])
def test_expert_runs_at_other_rates_at_the_same_pace(rate_hz: float) -> None:
    environment = TabletopEnvironment(rate_hz=rate_hz)
    success, steps, _, _ = run_expert(environment, 2, task="pick_place")
    assert success and 1.5 < steps / rate_hz < 4.0
    environment.close()


def test_expert_actions_are_smooth_and_inside_the_limits(environment: TabletopEnvironment) -> None:
    embodiment = environment.embodiment
    acceleration = np.array([joint.max_acceleration for joint in embodiment.joints])
    velocity = np.array([joint.max_velocity for joint in embodiment.joints])
    for family in tasks.FAMILIES:
        environment.reset(seed=3, options={"task": family})
        expert, path = Expert(environment), [environment.joint_state()[1]] * 2
        for _ in range(60):
            path.append(environment.kinematics.solve(expert.action(), path[-1]))
            if environment.step(Command(ControlMode.JOINT_POSITION, path[-1]))[2]:
                break
        speed = np.diff(np.array(path), axis=0) / embodiment.period_s
        assert np.all(np.abs(speed) <= 0.9 * velocity)
        assert np.all(np.abs(np.diff(speed, axis=0)) / embodiment.period_s <= 0.8 * acceleration)


# ---- tasks ----
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_scenes_are_reachable_apart_and_need_both_words(family: str) -> None:
    said = set()
    for seed in range(60):
        layout = tasks.sample(family, np.random.default_rng(seed))
        things = (*layout.movable, *layout.plates)
        assert len({thing.name for thing in things}) == len(things)
        for one, other in itertools.combinations(layout.movable, 2):
            assert np.linalg.norm(one.xy - other.xy) > 3 * HALF_WIDTH_M
        for thing in things:
            assert np.all(thing.xy >= tasks.AREA_LOWER) and np.all(thing.xy <= tasks.AREA_UPPER)
        asked = layout.movable[layout.goals[0].object]
        rest = [thing for thing in layout.movable if thing is not asked]
        assert any(thing.color == asked.color and thing.shape != asked.shape for thing in rest)
        assert any(thing.shape == asked.shape and thing.color != asked.color for thing in rest)
        text = layout.instruction(layout.goals[0])
        assert asked.name in text
        said.add(layout.template)
    assert len(said) == len(tasks.TEMPLATES[family]) >= 5


def test_all_draws_every_family_by_seed_and_families_restrict_it(environment: TabletopEnvironment) -> None:
    drawn = [environment.reset(seed=seed)[1]["family"] for seed in range(20)]
    assert set(drawn) == set(tasks.FAMILIES)
    assert drawn == [environment.reset(seed=seed)[1]["family"] for seed in range(20)]
    only = TabletopEnvironment(families=("push", "stack"))
    assert {only.reset(seed=seed)[1]["family"] for seed in range(12)} == {"push", "stack"}


def test_idle_arm_does_not_succeed(environment: TabletopEnvironment) -> None:
    for family in tasks.FAMILIES:
        environment.reset(seed=1, options={"task": family})
        hold = Command(ControlMode.JOINT_POSITION, environment.joint_state()[1])
        steps = 0
        while True:
            _, reward, terminated, truncated, info = environment.step(hold)
            steps += 1
            assert not terminated and reward == 0.0 and info["moved"] is None
            if truncated:
                break
        assert steps == environment.max_steps


def test_held_above_its_place_is_not_yet_success(environment: TabletopEnvironment) -> None:
    environment.reset(seed=4, options={"task": "pick_place"})
    expert, reference = Expert(environment), environment.joint_state()[1]
    for _ in range(environment.max_steps):
        action = expert.action()
        arrived = tasks.at_destination(environment.scene, environment.goal)
        if arrived:
            action = np.array([0, 0, 0, 0, 0, 0, -1.0])  # keep hold of it
        reference = environment.kinematics.solve(action, reference)
        _, _, terminated, _, info = environment.step(Command(ControlMode.JOINT_POSITION, reference))
        assert not terminated
    assert arrived and info["success"] is False


# ---- language swap ----
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_swap_asks_for_another_object_in_the_same_scene(environment: TabletopEnvironment, family: str) -> None:
    for seed in range(4):
        observation, info = environment.reset(seed=seed, options={"task": family})
        image, words = observation.images["agentview"].copy(), environment.instruction
        swapped, other = environment.reset(seed=seed, options={"task": family, "swap": True})
        assert np.array_equal(swapped.images["agentview"], image)
        assert other["object"] != info["object"] and swapped.instruction != words
        assert other["object"] in swapped.instruction


def test_expert_follows_the_swapped_instruction(environment: TabletopEnvironment) -> None:
    moved = [run_expert(environment, 5, task="pick_place", swap=swap)[2]["moved"] for swap in (False, True)]
    assert moved[0] != moved[1] and None not in moved


def test_a_goal_can_be_named(environment: TabletopEnvironment) -> None:
    environment.reset(seed=5, options={"task": "pick_place"})
    for thing in environment.layout.movable:
        _, info = environment.reset(seed=5, options={"task": "pick_place", "goal": thing.name})
        assert info["object"] == thing.name and thing.name in environment.instruction
    with pytest.raises(ConfigError, match="goal: no object 'pink cube'"):
        environment.reset(seed=5, options={"task": "pick_place", "goal": "pink cube"})


# ---- slices, for the simulator node ----
def test_slices_add_up_to_a_step() -> None:
    whole, sliced = TabletopEnvironment(task="pick_place"), TabletopEnvironment(task="pick_place")
    for each in (whole, sliced):
        each.reset(seed=8)
    target = whole.joint_state()[1] + 0.03 * np.array([1, -1, 1, -1, 1, -1, 1, -0.5])
    for scale in (1.0, 2.0, 2.0):
        command = Command(ControlMode.JOINT_POSITION, target * scale)
        observation, *_ = whole.step(command)
        sliced.advance(command, 0.010)
        for _ in range(4):
            sliced.advance(None, 0.010)
        assert np.array_equal(observation.state, sliced.observe().state)
        assert sliced.stamp_ns == whole.stamp_ns


# ---- what is refused ----
def test_misuse_is_named(environment: TabletopEnvironment) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pick_place'"):
        make("tabletop", task="pick_plaice")
    with pytest.raises(ConfigError, match="Did you mean 'push'"):
        TabletopEnvironment(families=("pushh",))
    with pytest.raises(ConfigError, match="Did you mean 'swap'"):
        environment.reset(seed=1, options={"swapp": True})
    with pytest.raises(ObservationError, match="instruction"):
        environment.reset(seed=1, options={"instruction": "  "})
    with pytest.raises(SimulationError, match="reset"):
        TabletopEnvironment().step(Command(ControlMode.JOINT_POSITION, np.zeros(8)))
    environment.reset(seed=1)
    with pytest.raises(SimulationError, match="8 values"):
        environment.step(Command(ControlMode.JOINT_POSITION, np.zeros(7)))
    with pytest.raises(SimulationError, match="NaN"):
        environment.step(Command(ControlMode.JOINT_POSITION, np.full(8, np.nan)))


def test_no_gl_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    blind = TabletopEnvironment()
    observation, _ = blind.reset(seed=0)
    with pytest.raises(SimulationError, match="apt-get install -y libosmesa6"):
        observation.images["agentview"]
    monkeypatch.setenv("MUJOCO_GL", "glx")
    with pytest.raises(SimulationError, match="MUJOCO_GL"):
        rendering.backend()
