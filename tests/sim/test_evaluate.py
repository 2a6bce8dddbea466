"""Evaluation: rates with intervals, resumed reports, and controls that change what they say they change."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytest

from policies.hold import HoldPolicy
from sim.control import ExpertPolicy, make_expert
from sim.environment import EVAL_SEED_START, make
from sim.evaluate import BlankImages, EpisodeRecord, EvalConfig, Report, evaluate, measure
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, EmbodimentMismatch
from vla.policy import InferContext, InferResult
from vla.types import Frame, Observation

STEPWISE = EvalConfig(policy="expert", episodes=3, scheduler="sequential", execute=1, latency_s=0.0)


@pytest.fixture(scope="module")
def environment() -> Iterator[Any]:
    made = make("tabletop")
    yield made
    made.close()


class Witness:
    """Passes everything to a policy and remembers what it was shown."""

    def __init__(self, policy: Any):
        self._policy, self.embodiment, self.horizon = policy, policy.embodiment, policy.horizon
        self.heard: list[str] = []
        self.seen: list[Observation] = []

    def reset(self, seed: int) -> None:
        self._policy.reset(seed)

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        self.heard += [observation.instruction for observation in observations]
        self.seen += list(observations)
        return list(self._policy.infer_batch(observations, contexts))


def expert(environment: Any) -> Witness:
    return Witness(ExpertPolicy(make_expert("tabletop", environment), environment.embodiment))


def test_expert_succeeds_and_holding_does_not(environment: Any) -> None:
    report = evaluate(expert(environment), STEPWISE, environment=environment)
    assert report.success.successes == 3 and report.followed is not None and report.followed.successes == 3
    assert {record.family for record in report.episodes} == {"pick_place", "stack", "push"}
    assert [record.seed for record in report.episodes] == [EVAL_SEED_START + i for i in range(3)]
    still = evaluate(HoldPolicy(environment.embodiment), replace(STEPWISE, episodes=1), environment=environment)
    assert still.success.successes == 0


def test_swapped_scene_is_the_same_and_another_object_is_asked_for(environment: Any) -> None:
    config = replace(STEPWISE, task="pick_place")
    plain = evaluate(expert(environment), config, environment=environment)
    other = evaluate(expert(environment), config, "swapped", environment=environment)
    assert other.success.successes == 3
    for a, b in zip(plain.episodes, other.episodes, strict=True):
        assert a.instruction != b.instruction and a.target != b.target and b.moved == b.target
    environment.reset(seed=config.seed, options={"task": "pick_place"})
    before = environment.observe().images["agentview"].copy()
    environment.reset(seed=config.seed, options={"task": "pick_place", "swap": True})
    np.testing.assert_array_equal(environment.observe().images["agentview"], before)


def test_shuffled_tells_another_scenes_instruction(environment: Any) -> None:
    witness = expert(environment)
    report = evaluate(witness, replace(STEPWISE, episodes=2), "shuffled", environment=environment)
    for record in report.episodes:
        environment.reset(seed=record.seed, options={"task": record.task})
        assert record.instruction != environment.instruction
        assert record.instruction in witness.heard and environment.instruction not in witness.heard
    # the judge still asks for the scene's own goal, which the expert reads from the simulator
    assert report.success.successes == 2


def test_blank_hides_all_images_and_nothing_else(environment: Any) -> None:
    witness = expert(environment)
    observation, _ = environment.reset(seed=EVAL_SEED_START)
    frame = Frame(observation.images, observation.state, 0)
    BlankImages(witness).infer_batch([replace(observation, history=(frame,))], [InferContext()])  # type: ignore[arg-type]
    (seen,) = witness.seen
    for images in (seen.images, seen.history[0].images):
        assert set(images) == {"agentview", "wrist"}
        assert all(image.shape == (128, 128, 3) and not image.any() for image in images.values())
    assert seen.instruction == observation.instruction
    np.testing.assert_array_equal(seen.state, observation.state)


def reachable(root: object) -> set[str]:
    """Top-level packages of the types of all objects that can be reached from one, closures included."""
    seen: dict[int, object] = {}
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (ModuleType, type)):
            continue
        seen[id(item)] = item
        if isinstance(item, FunctionType):  # what it was given, not the globals of its module
            todo += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, MethodType):
            todo += [item.__self__, item.__func__]
        elif isinstance(item, np.ndarray):
            todo.append(item.base)
        else:
            todo += gc.get_referents(item)
    return {type(item).__module__.partition(".")[0] for item in seen.values()}


def test_no_simulator_state_is_reachable_from_what_a_policy_is_given(environment: Any) -> None:
    """Not through images, state, instruction or context: neither the environment nor mujoco's data behind it."""

    class Prisoner(HoldPolicy):
        found: set[str]

        def reset(self, seed: int) -> None:
            self.found = set()

        def infer_batch(
            self, observations: Sequence[Observation], contexts: Sequence[InferContext]
        ) -> list[InferResult]:
            self.found |= reachable([*observations, *contexts])
            return super().infer_batch(observations, contexts)

    observation, _ = environment.reset(seed=EVAL_SEED_START)
    assert {"sim", "mujoco"} <= reachable(observation), "lazy images do hold the simulator: the search works"
    prisoner = Prisoner(environment.embodiment)
    for control in ("none", "blank"):
        evaluate(prisoner, replace(STEPWISE, episodes=1), control, environment=environment)
        assert prisoner.found and not prisoner.found & {"sim", "mujoco", "gymnasium", "robosuite", "libero"}
    assert set(observation.images) == set(environment.embodiment.camera_names)
    assert observation.state.shape == (len(environment.embodiment.state_names),)


def test_a_report_continues(environment: Any, tmp_path: Path) -> None:
    config = replace(STEPWISE, episodes=2, out=str(tmp_path / "eval"))
    first = evaluate(expert(environment), config, policy_id="a", environment=environment)
    assert Report.read(tmp_path / "eval/none.json") == first
    begun: list[int] = []
    witness = expert(environment)
    second = evaluate(
        witness,
        replace(config, episodes=3),
        policy_id="a",
        environment=environment,
        on_episode=lambda report: begun.append(len(report.episodes)),
    )
    assert begun == [3] and second.episodes[:2] == first.episodes
    shorter = replace(config, episodes=1, seed=config.seed + 1)
    with pytest.raises(ConfigError, match="seed"):  # another first seed is another run
        evaluate(expert(environment), shorter, policy_id="a", environment=environment)
    fewer = evaluate(expert(environment), replace(config, episodes=1), policy_id="a", environment=environment)
    assert fewer.episodes == first.episodes[:1]
    assert Report.read(tmp_path / "eval/none.json") == second  # a shorter run forgets nothing
    with pytest.raises(ConfigError, match="policy='a' there, 'b' now"):
        evaluate(expert(environment), config, policy_id="b", environment=environment)
    path = tmp_path / "eval/none.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"none\.json"):
        evaluate(expert(environment), config, policy_id="a", environment=environment)


def test_episodes_repeat(environment: Any) -> None:
    config = replace(STEPWISE, episodes=1, task="push")
    runs = [evaluate(expert(environment), config, environment=environment).episodes[0] for _ in range(2)]
    assert replace(runs[0], inference_p95_ms=None) == replace(runs[1], inference_p95_ms=None)


def test_measure_runs_all_controls(tmp_path: Path) -> None:
    config = replace(STEPWISE, episodes=1, controls=("none", "swapped"), out=str(tmp_path))
    reports = measure(config)
    assert list(reports) == ["none", "swapped"] == sorted(path.stem for path in tmp_path.iterdir())
    plain = json.loads((tmp_path / "none.json").read_text())
    assert plain["success"] == {"successes": 1, "trials": 1, "rate": 1.0, "wilson_95": [0.2065, 1.0]}


def test_reuses_are_counted_in_every_episode_and_in_the_report(environment: Any, tmp_path: Path) -> None:
    class Reusing(Witness):
        def infer_batch(self, observations: Any, contexts: Any) -> list[InferResult]:
            results = super().infer_batch(observations, contexts)
            reason = "angle" if len(self.seen) % 4 == 0 else ""
            return [replace(result, report=replace(result.report, reused=reason)) for result in results]

    policy = Reusing(ExpertPolicy(make_expert("tabletop", environment), environment.embodiment))
    config = replace(STEPWISE, episodes=2, out=str(tmp_path))
    report = evaluate(policy, config, environment=environment)
    assert sum(e.reused for e in report.episodes) == report.reused == len(policy.seen) // 4 > 0
    path = tmp_path / "none.json"
    written = json.loads(path.read_text())
    assert (written["inferences"], written["reused"]) == (len(policy.seen), report.reused)
    assert f"reused chunks: {report.reused} of {len(policy.seen)}" in report.table()
    del written["episodes"][0]["reused"]  # a report of the first release
    path.write_text(json.dumps(written))
    assert Report.read(path).reused is None and "reused" not in Report.read(path).table()


def test_table_and_intervals() -> None:
    def record(seed: int, family: str, success: bool) -> EpisodeRecord:
        return EpisodeRecord(seed, family, family, "go", success, 9, None, None, 1, 1.0, {}, 9, 0)

    report = Report({}, tuple(record(i, "ab"[i % 2], i != 3) for i in range(10)))
    assert report.families()["a"].successes == 5 and report.families()["b"].successes == 4
    assert report.followed is None
    low, high = report.success.interval  # scipy.stats.binomtest(9, 10).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert "9/10" in report.table() and "59.6 to 98.2 %" in report.table()


def test_wrong_arguments_are_named(environment: Any) -> None:
    with pytest.raises(ConfigError, match="demonstration_seeds"):
        EvalConfig(seed=5)
    assert EvalConfig(seed=5, demonstration_seeds=True).seed == 5
    with pytest.raises(ConfigError, match="Did you mean 'blank'"):
        EvalConfig(controls=("blanks",))
    with pytest.raises(ConfigError, match="Did you mean 'overlapped'"):
        EvalConfig(scheduler="overlaped")
    with pytest.raises(ConfigError, match="Did you mean 'push'"):
        evaluate(expert(environment), replace(STEPWISE, task="pusch"), environment=environment)
    robot = environment.embodiment
    other = Embodiment.from_dict(robot.to_dict() | {"gripper_open": -1, "rate_hz": 10.0})
    with pytest.raises(EmbodimentMismatch, match=r"rate_hz.*gripper_open"):
        evaluate(HoldPolicy(other), STEPWISE, environment=environment)
