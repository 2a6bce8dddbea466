"""The contract of sim/environment.py, over every member. LIBERO and robosuite run where `vla setup libero` did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sim.environment import make
from sim.libero.assets import unavailable_reason
from sim.tabletop.rendering import OffscreenRenderer
from vla.errors import ConfigError, ObservationError, SimulationError
from vla.types import Command, ControlMode, Observation

EXTRAS = {"libero_object": True, "robosuite": False}  # name -> whether it needs the LIBERO assets
MEMBERS = ["tabletop", *(pytest.param(name, marks=pytest.mark.libero) for name in EXTRAS)]
STEPS = 6


def require(name: str) -> None:
    reason = unavailable_reason(assets=EXTRAS[name]) if name in EXTRAS else ""
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=MEMBERS)
def environment(request: pytest.FixtureRequest) -> Iterator[Any]:
    require(request.param)
    made = make(request.param)
    yield made
    made.close()


def commands(environment: Any, seed: int) -> Iterator[Command]:
    """Small random motion in the environment's own control mode."""
    rng = np.random.default_rng(seed)
    mode = environment.embodiment.control_mode
    size = len(environment.embodiment.command_names)
    while True:
        if mode is ControlMode.OSC_DELTA:
            yield Command(mode, rng.uniform(-1, 1, size))
        else:
            yield Command(mode, environment.joint_state()[1] + rng.uniform(-0.02, 0.02, size))


def rollout(environment: Any, seed: int) -> dict[str, np.ndarray | str]:
    observation, info = environment.reset(seed=seed)
    first = {f"first {name}": image.copy() for name, image in observation.images.items()}
    states, motion = [observation.state], commands(environment, seed)
    for _ in range(STEPS):
        observation, _, _, _, info = environment.step(next(motion))
        states.append(observation.state)
    _, positions, velocities = environment.joint_state()
    last = {f"last {name}": image.copy() for name, image in observation.images.items()}
    recorded = {"states": np.array(states), "positions": positions, "velocities": velocities, **first, **last}
    return recorded | {"instruction": environment.instruction, "task": info["task"]}


def test_observations_and_commands_fit_the_declared_spaces(environment: Any) -> None:
    observation, info = environment.reset(seed=3)
    embodiment = environment.embodiment
    assert isinstance(observation, Observation)
    observation.check()
    assert environment.observation_space.contains(
        {"images": {name: observation.images[name] for name in observation.images}, "state": observation.state}
    )
    assert tuple(observation.images) == embodiment.camera_names
    assert observation.state.shape == (embodiment.state_dim,)
    assert environment.action_space.shape == (len(embodiment.command_names),)
    stop = embodiment.stop(environment.joint_state()[1])
    assert environment.action_space.contains(stop.values)
    names, positions, velocities = environment.joint_state()
    assert names == tuple(joint.name for joint in embodiment.joints)
    assert positions.shape == velocities.shape == (len(names),)
    assert observation.instruction == environment.instruction
    assert isinstance(info["task"], str) and isinstance(info["family"], str)


def test_images_show_something(environment: Any) -> None:
    observation, _ = environment.reset(seed=3)
    for name, image in observation.images.items():
        assert image.std() > 5, f"{name} is nearly uniform"


def test_episodes_repeat_under_one_seed_whatever_happened_before(environment: Any) -> None:
    once, other, again = (rollout(environment, seed) for seed in (11, 12, 11))
    for key, value in once.items():
        assert np.array_equal(value, again[key]), key
    assert not np.array_equal(once["first agentview"], other["first agentview"])


def test_a_reset_leaves_the_global_generator_alone(environment: Any) -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    environment.reset(seed=1)
    assert np.random.random() == expected  # noqa: NPY002


def test_steps_report_success_and_advance_one_period(environment: Any) -> None:
    _, info = environment.reset(seed=3)
    assert info["success"] is False
    stamp, motion = info["stamp_ns"], commands(environment, 3)
    for _ in range(3):
        observation, reward, terminated, truncated, info = environment.step(next(motion))
        assert info["stamp_ns"] - stamp == round(environment.embodiment.period_s * 1e9)
        assert observation.stamp_ns == info["stamp_ns"]
        assert type(info["success"]) is bool and terminated is info["success"] and truncated is False
        assert reward == float(info["success"])
        stamp = info["stamp_ns"]


def test_nothing_is_rendered_until_somebody_looks(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    original = OffscreenRenderer.render

    def counting(self: OffscreenRenderer, data: Any, camera: str) -> np.ndarray:
        rendered.append(camera)
        return original(self, data, camera)

    monkeypatch.setattr(OffscreenRenderer, "render", counting)
    environment.reset(seed=3)
    motion = commands(environment, 3)
    for _ in range(3):
        observation, *_ = environment.step(next(motion))
    assert rendered == []
    assert observation.images["wrist"] is observation.images["wrist"]
    assert len(rendered) == 1
    assert observation.images["agentview"].shape == observation.images["wrist"].shape
    assert len(rendered) == 2


def test_images_of_an_earlier_step_are_kept_or_refused(environment: Any) -> None:
    observation, _ = environment.reset(seed=3)
    seen = observation.images["agentview"].copy()
    environment.step(next(commands(environment, 3)))
    assert np.array_equal(observation.images["agentview"], seen)
    with pytest.raises(SimulationError, match="before the next step"):
        observation.images["wrist"]
    with pytest.raises(KeyError, match="agentview"):
        observation.images["agentveiw"]


def test_instruction_can_be_replaced_for_one_episode(environment: Any) -> None:
    _, _ = environment.reset(seed=3)
    own = environment.instruction
    observation, _ = environment.reset(seed=3, options={"instruction": "do nothing at all"})
    assert observation.instruction == environment.instruction == "do nothing at all"
    environment.reset(seed=3)
    assert environment.instruction == own
    with pytest.raises(ObservationError, match="10000 characters"):
        environment.reset(seed=3, options={"instruction": "x" * 10_000})


def test_unknown_names_are_refused_with_the_nearest(environment: Any) -> None:
    name = environment.tasks[0]
    with pytest.raises(ConfigError, match=name):
        environment.reset(seed=3, options={"task": name[:-1] + "~"})
    with pytest.raises(ConfigError, match="instruction"):
        environment.reset(seed=3, options={"instuction": "pick"})


def test_bad_commands_are_refused(environment: Any) -> None:
    environment.reset(seed=3)
    good = next(commands(environment, 3))
    wrong = next(mode for mode in ControlMode if mode is not good.mode)
    values = good.values.copy()
    values[0] = np.nan
    for bad in (Command(wrong, good.values), Command(good.mode, good.values[:-1]), Command(good.mode, values)):
        with pytest.raises(SimulationError, match="command"):
            environment.step(bad)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_environment_must_be_reset_first_and_closes_twice(name: str) -> None:
    require(name)
    fresh = make(name)
    hold = Command(fresh.embodiment.control_mode, np.zeros(len(fresh.embodiment.command_names)))
    with pytest.raises(SimulationError, match="reset"):
        fresh.step(hold)
    observation, _ = fresh.reset(seed=3)
    assert observation.images["wrist"].any()
    fresh.close()
    fresh.close()
    with pytest.raises(SimulationError):
        observation.images["agentview"]


def test_an_unknown_environment_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="libero_object"):
        make("libero_objekt")
