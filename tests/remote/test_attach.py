"""Wherever a policy is named, an address is a name: evaluation, the policy node, the demonstration."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from policies.ensembling_policy import EnsemblingPolicy
from policies.hold import HoldPolicy
from policies.parts import Parts
from policies.remote.attach import attached
from policies.remote.client import RemotePolicy
from policies.remote.server import PolicyServer
from ros_nodes.policies import load_policy
from sim.evaluate import EvalConfig, evaluate, measure
from tests.remote.robots import QUICK, ROBOT, Echo, served
from vla import configs
from vla.cli.demo import _check
from vla.errors import ConfigError, EmbodimentMismatch, TransportError

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
