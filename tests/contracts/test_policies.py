"""The contract of vla/policy.py, over every member of policies/ that can run without a simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from policies.hold import HoldPolicy, ScriptedPolicy
from policies.vla_policy import VlaPolicy
from tests.remote.robots import served
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.embodiment import Embodiment
from vla.policy import InferContext, InferResult, Policy
from vla.resources import load_embodiment
from vla.types import Observation

MEMBERS = ("hold", "scripted", "vla", "vla, sampled", "remote")
START_NS = 7_000_000_000


@pytest.fixture(scope="module", params=MEMBERS)
def policy(request: pytest.FixtureRequest) -> Iterator[Policy]:
    robot = load_embodiment("tabletop")
    if request.param == "hold":
        yield HoldPolicy(robot)
    elif request.param == "scripted":
        chunks = np.random.default_rng(0).normal(size=(3, 4, robot.action_dim)).astype(np.float32)
        yield ScriptedPolicy(robot, list(chunks))
    elif request.param == "remote":
        with served(HoldPolicy(robot)) as remote:
            yield remote
    else:
        bundle: Path = request.getfixturevalue("tiny_bundle")
        yield VlaPolicy.from_bundle(bundle, AutoregressiveDecoder(1.0 if "sampled" in request.param else 0.0))


def observation(robot: Embodiment, seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {c.name: rng.integers(0, 255, (c.height, c.width, 3), dtype=np.uint8) for c in robot.cameras}
    state = rng.normal(scale=0.1, size=robot.state_dim).astype(np.float32)
    return Observation(images, state, "put the red cube on the blue plate", START_NS)


def run(policy: Policy, seed: int) -> list[InferResult]:
    """Three inferences, the last two in one batch."""
    policy.reset(seed)
    robot = policy.embodiment
    contexts = [InferContext(start_ns=START_NS + i, seed=i) for i in range(3)]
    seen = [observation(robot, i) for i in range(3)]
    return [*policy.infer_batch(seen[:1], contexts[:1]), *policy.infer_batch(seen[1:], contexts[1:])]


def test_it_fulfils_the_protocol_with_finite_chunks_that_are_due_when_asked(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    for index, result in enumerate(run(policy, 1)):
        chunk = result.chunk
        assert chunk.actions.shape == (policy.horizon, policy.embodiment.action_dim)
        assert chunk.actions.dtype == np.float32 and np.isfinite(chunk.actions).all()
        assert chunk.start_ns == START_NS + index and chunk.period_s == policy.embodiment.period_s


def test_it_repeats_bit_for_bit_after_reset(policy: Policy) -> None:
    first, _, again = run(policy, 5), run(policy, 6), run(policy, 5)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a.chunk.actions, b.chunk.actions)
        assert a.report.ids == b.report.ids


def test_observations_are_left_as_they_were(policy: Policy) -> None:
    robot = policy.embodiment
    given, kept = observation(robot, 0), observation(robot, 0)
    policy.reset(0)
    policy.infer_batch([given], [InferContext(start_ns=START_NS)])
    np.testing.assert_array_equal(given.state, kept.state)
    for name in robot.camera_names:
        np.testing.assert_array_equal(given.images[name], kept.images[name])
