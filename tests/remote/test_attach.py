"""Wherever a policy is named, an address is a name: evaluation, the policy node, the demonstration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from policies.ensembling_policy import EnsemblingPolicy
from policies.hold import HoldPolicy, ScriptedPolicy
from policies.parts import Parts
from policies.remote.attach import attached
from policies.remote.client import RemotePolicy
from policies.remote.server import PolicyServer
from policies.reuse_policy import ReusePolicy
from ros_nodes.policies import load_policy
from sim.evaluate import EvalConfig, evaluate, measure
from tests.remote.robots import QUICK, ROBOT, Echo, observation, served
from vla import configs
from vla.cli.demo import _check
from vla.errors import ConfigError, EmbodimentMismatch, TransportError
from vla.policy import DecodeReport, InferContext, InferResult, Policy, PolicyWrapper, infer
from vla.types import ActionChunk, Observation

SERVED = {"decoder": configs.describe(configs.load("decoder", "jacobi")), "pruning": None}


def test_an_evaluation_over_the_socket_is_the_one_in_process() -> None:
    settings = EvalConfig(episodes=1, task="pick_place")
    with served(HoldPolicy(ROBOT), fingerprint="abc") as remote:
        report = measure(replace(settings, policy=remote.address))["none"]
        assert report.identity["policy"] == remote.identity and "abc" in remote.identity
    here = evaluate(HoldPolicy(ROBOT), settings)
    times = {"inference_p95_ms": None}
    assert [asdict(e) | times for e in report.episodes] == [asdict(e) | times for e in here.episodes]


def test_the_policy_node_and_the_demonstration_take_an_address() -> None:
    with served(Echo(), parts=SERVED) as remote:
        policy = load_policy(remote.address, "tabletop")
        assert isinstance(policy, RemotePolicy)
        policy.close()
        _check("tabletop", remote.address, {})
        with pytest.raises(EmbodimentMismatch, match="robot 'libero'"):
            _check("libero_object", remote.address, {})
        with pytest.raises(ConfigError, match="embodiment"):
            load_policy(remote.address)
        address = remote.address
    with pytest.raises(TransportError, match="a policy server"):
        _check("tabletop", address, {})


def test_the_servers_parts_stay_there_and_the_robots_here() -> None:
    with PolicyServer(Echo(), port=0, limits=QUICK, parts=SERVED).running() as address:
        policy, remote = attached(address, ROBOT, Parts.named({"decoder": ["jacobi"], "ensembling": ["act"]}))
        assert isinstance(policy, EnsemblingPolicy) and policy.policy is remote
        remote.close()
        for other in ({"decoder": ["jacobi", "window=3"]}, {"decoder": ["autoregressive"]}, {"pruning": ["score"]}):
            (group,) = other
            with pytest.raises(ConfigError, match=f"{group}: expected the server's"):
                attached(address, ROBOT, Parts.named(other))


# ---- several robots, each with a memory ----
class Steady(Echo):
    """Always the same way, as far as the picture is bright, and with an eye on the same places: reuse may stand."""

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        report, way = DecodeReport(kept_tokens=np.arange(9)), np.linspace(0.1, 0.2, 56, dtype=np.float32).reshape(8, 7)
        bright = [result.chunk.actions[0, 0] for result in super().infer_batch(observations, contexts)]
        return [InferResult(ActionChunk(way * b, c.start_ns, 0.05), report) for b, c in zip(bright, contexts)]


def steps(policy: Policy, number: int) -> Iterator[tuple[bytes, str]]:
    """Six inferences of one robot: its actions, and why a chunk was reused."""
    previous = None
    for step in range(6):
        executed = 0 if previous is None else 4
        asked = InferContext(previous, executed, None, 10**9 + 4 * step * 50_000_000, step)
        result = infer(policy, observation(10 * number + step, instruction="push"), asked)
        previous = result.chunk
        yield previous.actions.tobytes(), result.report.reused


def test_two_robots_of_one_server_each_remember_their_own() -> None:
    chosen: dict[str, Any] = {"reuse": ["flashvla"], "ensembling": ["act"]}
    with PolicyServer(Steady(), port=0, limits=QUICK, parts={**SERVED, "pruning": {"layer": 1}}).running() as address:
        pairs = [attached(address, ROBOT, Parts.named(chosen)) for _ in range(2)]
        together = list(zip(*(steps(policy, number) for number, (policy, _) in enumerate(pairs))))  # in turns
        for _, remote in pairs:
            remote.close()
    for number, there in enumerate(zip(*together)):
        here = list(steps(Parts.named(chosen).around(Steady()), number))
        assert list(there) == here and any(reused for _, reused in here)
    assert not any(mine == theirs for (mine, _), (theirs, _) in together)


@pytest.mark.parametrize("policy", [
    ReusePolicy(Echo()), EnsemblingPolicy(Echo()), PolicyWrapper(EnsemblingPolicy(Echo())),
    ScriptedPolicy(ROBOT, [np.zeros((4, 7), np.float32)]),
])  # fmt: skip
def test_a_server_takes_no_policy_that_remembers(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="policy: expected one that keeps nothing between calls"):
        PolicyServer(policy, port=0)


def test_reuse_needs_a_server_that_looks_where_it_matters() -> None:
    with served(Echo(), parts=SERVED) as remote, pytest.raises(ConfigError, match="vla serve` with --pruning score"):
        attached(remote.address, ROBOT, Parts.named({"reuse": ["flashvla"]}))
