"""Jacobi with a cap: what it equals when the cap does not bite, what stays in the cache, what is refused."""

import pytest
import torch

from tests.contracts.test_decoders import decode, model_of, prompt, tokenizer_of
from tests.decoding.test_continuous import bundle_of
from vla.configs import load, names
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.decoding.capped import CappedJacobiDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix

GRAMMAR = Grammar(tokenizer_of("bins"), 8, 2)


def model(seed: int):
    return model_of(tokenizer_of("bins"), seed)


@pytest.mark.parametrize("window", [0, 1, 3, 8, 16])
@pytest.mark.parametrize("batch", [1, 2])
def test_with_passes_enough_it_is_greedy(window: int, batch: int) -> None:
    for seed in range(8):
        prompts = prompt(seed, batch)
        greedy, _ = decode(AutoregressiveDecoder(), model(seed), GRAMMAR, prompts)
        capped, suffix = decode(CappedJacobiDecoder(17, window), model(seed), GRAMMAR, prompts)
        assert capped.ids == greedy.ids
        assert capped.confidence == pytest.approx(greedy.confidence, abs=1e-4)
        assert suffix.length == 16 if (window or 16) > 1 else suffix.length >= 15


@torch.inference_mode()
@pytest.mark.parametrize("window", [3, 4])
def test_nothing_of_a_discarded_guess_stays_in_the_cache(window: int) -> None:
    """What follows an unsettled block is conditioned on the tokens that were given out, and on no others."""
    one, prompts = model(5), prompt(5, 2)
    prefix = one.prefix(one.prefix_segments(*prompts), 16)
    suffix = TokenSuffix(one, prefix, "words")
    out = CappedJacobiDecoder(1, window).generate(suffix, GRAMMAR, [Hint()] * 2)
    assert out.passes == -(-16 // window)
    tokens = torch.tensor(out.ids)
    starts = torch.full_like(tokens[:, :1], suffix.start_id)
    suffix.truncate(0)
    whole = suffix.logits(torch.cat((starts, tokens[:, :-1]), dim=1))
    firsts = list(range(0, 16, window))  # the first token of a block depends on finished blocks alone
    likely = whole[:, firsts].softmax(dim=-1).max(dim=-1)
    assert torch.equal(tokens[:, firsts], likely.indices)
    assert torch.allclose(torch.tensor(out.probabilities)[:, firsts], likely.values, atol=1e-4)


@torch.inference_mode()
def test_a_perfect_draft_settles_in_one_pass() -> None:
    greedy, _ = decode(AutoregressiveDecoder(), model(1), GRAMMAR, prompt(1, 1))
    one = model(1)
    suffix = TokenSuffix(one, one.prefix(one.prefix_segments(*prompt(1, 1)), 16), "words")
    out = CappedJacobiDecoder(9, warm=True).generate(suffix, GRAMMAR, [Hint(draft=tuple(greedy.ids[0]))])
    assert out.ids == greedy.ids and out.passes == 1


def test_without_a_cap_a_block_has_as_many_passes_as_tokens() -> None:
    for window in (0, 5):
        greedy, _ = decode(AutoregressiveDecoder(), model(2), GRAMMAR, prompt(2, 1))
        free, _ = decode(CappedJacobiDecoder(0, window), model(2), GRAMMAR, prompt(2, 1))
        assert free.ids == greedy.ids
    passes = [
        decode(CappedJacobiDecoder(0, both_ways=True), model(s), GRAMMAR, prompt(s, 1))[0].passes for s in range(8)
    ]
    assert max(passes) == 16  # one that never settles ends with the block's size


def test_both_ways_is_another_decoder() -> None:
    differs = 0
    for seed in range(6):
        greedy, _ = decode(AutoregressiveDecoder(), model(seed), GRAMMAR, prompt(seed, 1))
        both, _ = decode(CappedJacobiDecoder(40, both_ways=True), model(seed), GRAMMAR, prompt(seed, 1))
        assert len(both.ids[0]) == 16
        differs += both.ids != greedy.ids
    assert differs > 3 and not CappedJacobiDecoder(both_ways=True).exact


def test_a_config_called_jacobi_is_exact_and_the_one_that_sees_both_ways_says_that_it_is_not() -> None:
    assert load("decoder", "inexact_bidirectional").both_ways
    assert all(load("decoder", name).exact for name in names("decoder") if "jacobi" in name)
    assert not any(load("decoder", name).exact for name in names("decoder") if "inexact" in name)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.passes"):
        CappedJacobiDecoder(-1)
    with pytest.raises(ConfigError, match=r"decoder\.window"):
        CappedJacobiDecoder(window=-1)
    with pytest.raises(ConfigError, match=r"decoder\.window: expected 0 with both_ways, got 4"):
        CappedJacobiDecoder(window=4, both_ways=True)
    bundle = bundle_of(heads=(HeadConfig("words", "tokens", 1, 9),))
    CappedJacobiDecoder(window=12).check(bundle)
    with pytest.raises(ConfigError, match=r"decoder\.window: expected at most 12"):
        CappedJacobiDecoder(window=13).check(bundle)
