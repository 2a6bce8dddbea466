"""The block length that a decoder takes from what passes cost."""

import numpy as np
import pytest
import torch

from tests.contracts.test_decoders import decode, model_of, prompt, tokenizer_of
from vla.decoding import costs
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.decoding.jacobi import JacobiDecoder
from vla.decoding.speculative import SpeculativeDecoder
from vla.models.suffix import TokenSuffix


def test_free_passes_want_long_blocks_and_dear_ones_short() -> None:
    flat, linear = dict.fromkeys(costs.LENGTHS, 1.0), {n: float(n) for n in costs.LENGTHS}
    assert costs.best_length(flat, 0.7) > 20
    assert costs.best_length(linear, 0.7) == 1
    cpu = {1: 0.25, 2: 0.29, 4: 0.36, 8: 0.5, 16: 0.85, 32: 1.6, 64: 3.3, 112: 5.4}
    lengths = [costs.best_length(cpu, agreement) for agreement in (0.0, 0.5, 0.7, 0.9, 1.0)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and 2 < lengths[2] < 16 < lengths[-1]


def test_agreement_is_what_the_settled_tokens_say() -> None:
    rng = np.random.default_rng(0)
    for agreement, length in ((0.3, 4), (0.7, 8), (0.9, 16)):
        right = rng.random((100_000, length - 1)) < agreement
        settled = 1 + np.cumprod(right, axis=1).sum(axis=1).mean()
        assert settled == pytest.approx(costs.settled_per_pass(length, agreement), rel=0.01)
        assert costs.agreement_of(settled, length) == pytest.approx(agreement, abs=0.01)


@torch.inference_mode()
def test_passes_are_measured_and_leave_nothing_behind() -> None:
    tokenizer = tokenizer_of("bins")
    model, grammar = model_of(tokenizer, 0), Grammar(tokenizer, 8, 2)
    suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompt(0, 1)), grammar.values), "words")
    measured = costs.pass_costs(suffix)
    assert list(measured) == [1, 2, 4, 8, 16] and min(measured.values()) > 0  # 16 is all the room there is
    assert suffix.length == 0


@torch.inference_mode()
@pytest.mark.parametrize("decoder", [JacobiDecoder(), SpeculativeDecoder(length=0)], ids=["jacobi", "speculative"])
def test_a_length_left_to_the_device_is_exact_whatever_it_is(decoder) -> None:
    tokenizer = tokenizer_of("bins")
    model, grammar = model_of(tokenizer, 1), Grammar(tokenizer, 8, 2)
    suffixes = [
        TokenSuffix(model, model.prefix(model.prefix_segments(*prompt(1, 1)), grammar.values), "words")
        for _ in range(3)
    ]
    greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompt(1, 1))
    draft = tuple(greedy.ids[0])
    for suffix, length in zip(suffixes, (3, 7, 16)):
        out = decoder.generate(suffix, grammar, [Hint(draft=draft, length=length)])
        assert out.ids == greedy.ids
        assert out.passes == -(-16 // length) or (isinstance(decoder, SpeculativeDecoder) and out.passes < 6)
