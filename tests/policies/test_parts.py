"""One home for what a bundle is run with: names on a command line, their order around a policy, their description."""

import argparse

import pytest

from policies.ensembling_policy import EnsemblingPolicy
from policies.parts import GROUPS, Parts, add_arguments, command_line, named_in
from policies.reuse_policy import ReusePolicy
from policies.vla_policy import VlaPolicy
from ros_nodes.graph import Graph
from sim.evaluate import EvalConfig
from tests.decoding.test_continuous import bundle_of
from vla.configs import load, names
from vla.decoding.chunks import Ensembling
from vla.decoding.reuse import ReuseRule
from vla.errors import ConfigError
from vla.models.heads import HeadConfig

NAMES = {"decoder": ("jacobi", "window=4"), "reuse": ("flashvla",), "ensembling": ("act", "decay=-0.1")}


@pytest.fixture(autouse=True)
def somewhere(monkeypatch) -> None:
    """Any folder holds the same small bundle."""
    bundle = bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),), text_vocab=512)
    monkeypatch.setattr("vla.checkpoints.bundle.load", lambda path, device: bundle)


def test_they_compose_in_one_order_around_a_bundle() -> None:
    parts = Parts.named({**NAMES, "pruning": ["score", "layer=1"]})
    policy, inner = parts.load("somewhere")
    assert isinstance(policy, EnsemblingPolicy) and isinstance(policy.policy, ReusePolicy)
    assert policy.policy.policy is inner and inner.selection == parts.pruning and inner.decoder.window == 4
    assert policy.rule == Ensembling(-0.1) and policy.policy.rule == ReuseRule()
    plain, innermost = Parts().load("somewhere")
    assert plain is innermost and isinstance(plain, VlaPolicy) and plain.decoder.exact


def test_what_cannot_work_is_refused_before_it_runs() -> None:
    with pytest.raises(ConfigError, match=r"reuse: .*pruning score"):
        Parts(reuse=ReuseRule()).load("somewhere")
    with pytest.raises(ConfigError, match=r"Did you mean 'flashvla'"):
        Parts.named({"reuse": ["flashva"]})
    with pytest.raises(ConfigError, match=r"ensembling act: unknown key 'decy'. Did you mean 'decay'"):
        Parts.named({"ensembling": ["act", "decy=1"]})
    with pytest.raises(ConfigError, match=r"decoder\.head"):
        Parts.named({"decoder": ["flow"]}).load("somewhere")


def test_a_command_line_says_what_was_named(tmp_path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy")
    add_arguments(parser)
    assert named_in(parser.parse_args([*command_line(NAMES), "--policy", "x"])) == NAMES
    assert named_in(parser.parse_args([])) == {}
    graph = Graph("tabletop", "somewhere", out=tmp_path, parts=NAMES, domain=1)
    words = graph._commands["policy"]
    assert named_in(parser.parse_known_args(words[1:])[0]) == NAMES


def test_every_group_has_configs_that_describe_themselves() -> None:
    for group in GROUPS:
        for name in names(group):
            part = load(group, name)
            assert Parts(**{group: part}).describe()[group]["_target_"].endswith(f".{type(part).__name__}")
    assert set(Parts().describe()) == set(GROUPS) and set(Parts().describe().values()) == {None}


def test_a_report_is_identified_by_its_parts() -> None:
    with_one, without = EvalConfig(ensembling=Ensembling(0.1)), EvalConfig()
    identity = with_one.identity("hash", "none")
    assert identity["ensembling"] == {"_target_": "vla.decoding.chunks.Ensembling", "decay": 0.1}
    assert identity != without.identity("hash", "none") and identity["reuse"] is None
