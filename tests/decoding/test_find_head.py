"""Which head a decoder takes: the first that makes what it needs, and one clear error where none does."""

from dataclasses import replace

import numpy as np
import pytest

from policies.vla_policy import VlaPolicy
from tests.decoding.test_continuous import BINS, A, T, bundle_of
from vla.configs import load, names
from vla.decoding.anytime import AnytimeDecoder
from vla.decoding.base import TokenDecoder, find_head
from vla.decoding.capped import CappedJacobiDecoder
from vla.decoding.forced import ForcedPrefixDecoder
from vla.decoding.speculative import RelaxedDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.policy import InferContext, infer
from vla.tokenizers import BinTokenizer, FastTokenizer
from vla.types import Observation

CHUNKS = np.random.default_rng(0).normal(size=(60, T, A)).cumsum(axis=1).astype(np.float32) / 4
TOKENIZERS = {"bins": BinTokenizer(BINS), "fast": FastTokenizer.fit(CHUNKS, vocab_size=96, scale=2.0)}
WANTED = [
    (AnytimeDecoder(float("inf")), "fast"), (ForcedPrefixDecoder(), "bins"), (CappedJacobiDecoder(), "bins"),
    (RelaxedDecoder(), "bins"),
]  # fmt: skip


def bundle(*kinds: str):
    """With a token head of each kind, called by it, behind one that makes no tokens."""
    heads = [HeadConfig(kind, "tokens", 0, TOKENIZERS[kind].vocab_size) for kind in kinds]
    made = bundle_of(heads=(HeadConfig("flow", "flow", 2), *heads), text_vocab=512)
    return replace(made, action_tokenizers={kind: TOKENIZERS[kind] for kind in kinds})


@pytest.mark.parametrize(("decoder", "kind"), WANTED, ids=[type(decoder).__name__ for decoder, _ in WANTED])
def test_the_first_head_with_the_right_tokens_is_the_one_that_is_decoded(decoder, kind) -> None:
    images = {name: np.zeros((size, size, 3), np.uint8) for name, size in (("front", 32), ("wrist", 16))}
    seen = Observation(images, np.zeros(A, np.float32), "push", 1)
    for kinds in (("bins", "fast"), ("fast", "bins")):
        mixed = bundle(*kinds)
        result = infer(VlaPolicy(mixed, decoder), seen, InferContext(start_ns=1))
        said = TOKENIZERS[kind].decode(list(result.report.ids), T, A)
        np.testing.assert_allclose(mixed.action_normalizer.normalize(result.chunk.actions), said, atol=1e-6)
        assert decoder.head_in(mixed) == kind and find_head(mixed, "", "tokens") == kinds[0]


@pytest.mark.parametrize(("decoder", "kind"), WANTED, ids=[type(decoder).__name__ for decoder, _ in WANTED])
def test_other_tokens_are_refused_in_one_way(decoder, kind) -> None:
    (other,) = set(TOKENIZERS) - {kind}
    got = rf"got flow \(flow\), {other} \(tokens over {other}\)"
    with pytest.raises(ConfigError, match=rf"a head of kind 'tokens' over {kind}, {got}\. .*head=\[\.\.\.,{kind}\]"):
        decoder.check(bundle(other))
    named = type(decoder)(head=other)
    with pytest.raises(ConfigError, match=rf"over {kind} named {other!r}, .*Choose one of {kind}\."):
        named.check(bundle("bins", "fast"))


def test_a_remedy_names_a_head_that_there_is() -> None:
    """`vla train head=[...,NAME]` takes the files of configs/head."""
    for name in names("decoder"):
        decoder = load("decoder", name)
        if isinstance(decoder, TokenDecoder):
            with pytest.raises(ConfigError) as refused:
                decoder.head_in(bundle())
            (remedy,) = {kind for kind in names("head") if f"head=[...,{kind}]" in str(refused.value)}
            assert remedy == (decoder.tokenizer or "fast")
