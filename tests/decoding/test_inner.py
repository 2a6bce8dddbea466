"""A decoder inside another: what it finds is what greedy decoding finds there, in fewer passes."""

from dataclasses import replace

import numpy as np
import pytest

from tests.contracts.test_decoders import behind, bundle_for, prompt, running, tokenizer_of
from tests.decoding.test_continuous import BINS, bundle_of, given
from vla.configs import describe, load
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Decoded, DecodeInput, Grammar
from vla.decoding.continued import ContinuedDecoder
from vla.decoding.ensemble import EnsembleDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.tokenizers import BinTokenizer

INNER = [
    "jacobi", "jacobi window=5 warm=true", "speculative length=4", "speculative_shallow length=3 layers=1",
    "speculative_draft length=3 draft_head=draft", "early_exit threshold=1.0 layer=1",
]  # fmt: skip
COSTS = {1: 1.0, 16: 1.5}  # as on a GPU: long windows are chosen


def same(inner: Decoded, plain: Decoded) -> None:
    assert inner.ids == plain.ids
    np.testing.assert_array_equal(inner.actions, plain.actions)
    assert inner.confidence == pytest.approx(plain.confidence, abs=1e-4)
    assert inner.passes <= plain.passes


@pytest.mark.parametrize("kind", ["bins", "fast"])
@pytest.mark.parametrize("inner", [*INNER, "blockwise"])
def test_continued_tokens_are_greedys_whoever_finds_them(inner: str, kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    grammar, passes, ids, moved = Grammar(tokenizer, 8, 2), [0, 0], set(), []
    for seed in range(6):
        bundle, prompts = bundle_for(tokenizer, seed), prompt(seed, 1 + seed % 2)
        robot = replace(bundle.embodiment, action_names=("dx", "gripper"), action_units=("m", "1"))
        bundle = replace(bundle, embodiment=robot)
        near = behind(bundle, grammar, (*prompts[:3], prompts[3] + 0.1))
        running_now = running(AutoregressiveDecoder(head="words").decode(near), seed % 3)
        asked = behind(bundle, grammar, prompts, running_now, {"words": COSTS})
        plain, other = ContinuedDecoder(head="words"), ContinuedDecoder(inner=inner, head="words")
        other.check(bundle)
        out = [decoder.decode(asked) for decoder in (plain, other)]
        same(out[1], out[0])
        assert out[0].notes["moved"] == out[1].notes["moved"]
        moved += out[0].notes["moved"]
        passes = [count + decoded.passes for count, decoded in zip(passes, out)]
        ids |= {*out[0].ids}
    assert len(ids) > 6 and max(moved) > 0.1  # prompts and committed actions matter
    # Guesses that nobody trained are right by accident only, and an exit saves layers, not passes.
    assert passes[1] < passes[0] or inner.startswith(("blockwise", "early_exit", "speculative_"))


@pytest.fixture(scope="module")
def hybrid():
    """With a narrow head over the same tokens, and a chunk that nearly came out before."""
    tokenizer = BinTokenizer(BINS)
    heads = HeadConfig("both", "hybrid", 3, BINS), HeadConfig("draft", "tokens", 1, BINS)
    bundle = bundle_of(tokenizer, heads=heads)
    asked = replace(given(bundle), costs={"both": COSTS})
    return replace(asked, contexts=running(EnsembleDecoder(mode="tokens").decode(asked), 0))


@pytest.mark.parametrize("mode", ["tokens", "ensemble"])
@pytest.mark.parametrize("inner", INNER)
def test_tokens_behind_noise_are_greedys_whoever_finds_them(inner: str, mode: str, hybrid: DecodeInput) -> None:
    plain, other = (EnsembleDecoder(0.0, mode=mode, inner=name) for name in ("autoregressive", inner))
    other.check(hybrid.bundle)
    out = [decoder.decode(hybrid) for decoder in (plain, other)]
    assert hybrid.prefix.cache.length == hybrid.prefix.length
    same(out[1], out[0])
    assert all(len(set(ids)) > 2 for ids in out[0].ids)
    if mode == "ensemble":
        assert out[1].notes["averaged"] == [1.0, 1.0]
        assert out[1].notes["confidence"] == pytest.approx(out[0].notes["confidence"], abs=1e-4)
    if inner in ("jacobi window=5 warm=true", "speculative length=4"):
        assert out[1].passes < out[0].passes


def test_what_cannot_stand_inside_is_refused(hybrid) -> None:
    wanted = r"decoder\.inner: expected a decoder that gives greedy's tokens, got '{}'\. Take autoregressive, jacobi or"
    for inner in ("relaxed", "flow", "continued", "autoregressive temperature=1.0", "early_exit"):
        for kind in (ContinuedDecoder, EnsembleDecoder):
            with pytest.raises(ConfigError, match=wanted.format(inner)):
                kind(inner=inner)
    for inner, said in (("jacoby", "Did you mean 'jacobi'"), ("", "unknown choice ''"), ("jacobi windw=3", "'window'")):
        with pytest.raises(ConfigError, match=rf"decoder\.inner: .*{said}"):
            ContinuedDecoder(inner=inner)
    with pytest.raises(ConfigError, match=r"decoder\.window: expected at most 12"):
        EnsembleDecoder(inner="jacobi window=13").check(hybrid.bundle)
    with pytest.raises(ConfigError, match="'nobody'"):
        ContinuedDecoder(inner="jacobi", head="nobody").check(hybrid.bundle)


@pytest.mark.parametrize("name", ["continued", "ensemble"])
def test_it_is_named_in_a_config(name: str) -> None:
    made = load("decoder", name, ["inner=jacobi window=3", "head=x"])
    assert describe(made) == {**describe(load("decoder", name)), "inner": "jacobi window=3", "head": "x"}
    assert (made._inner.window, made._inner.head) == (3, "x")
