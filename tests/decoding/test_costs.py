"""The block length that a decoder takes from what passes cost."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.contracts.test_decoders import behind, bundle_for, decode, model_of, prompt, tokenizer_of
from vla.configs import load
from vla.decoding import costs
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint, probabilities
from vla.decoding.jacobi import JacobiDecoder
from vla.decoding.speculative import SpeculativeDecoder
from vla.models.suffix import TokenSuffix, best_tokens


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
        for _ in range(4)
    ]
    greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompt(1, 1))
    draft = tuple(greedy.ids[0])
    for suffix, length in zip(suffixes, (1, 3, 7, 16)):  # 1: a draft does not pay, and there is none
        out = decoder.generate(suffix, grammar, [Hint(draft=draft, length=length)])
        assert out.ids == greedy.ids and out.passes == -(-16 // length)


@pytest.mark.parametrize(
    "decoder",
    [JacobiDecoder(head="words"), SpeculativeDecoder("shallow", 0, head="words")],
    ids=["jacobi", "speculative"],
)
def test_costs_are_measured_once_whatever_batches_come(decoder, monkeypatch) -> None:
    tokenizer, costly, measured = tokenizer_of("bins"), {n: float(n) for n in costs.LENGTHS}, []
    monkeypatch.setattr("vla.decoding.base.pass_costs", lambda suffix: measured.append(suffix.batch) or costly)
    bundle, grammar, kept = bundle_for(tokenizer, 1), Grammar(tokenizer, 8, 2), {}
    for batch in (1, 2, 1, 3):
        given = behind(bundle, grammar, prompt(1, batch), costs=kept)
        assert decoder.decode(given).passes == 16  # every token costs as much as a pass, so passes have one
    assert measured == [1]


@pytest.mark.parametrize(("kind", "usual"), [("bins", 0.85), ("fast", 0.2)])
def test_how_often_guesses_are_right_is_taken_from_the_kind_of_tokens_where_nobody_says(kind, usual) -> None:
    """Passes that two tokens make little dearer: worth it for bins, not for FAST."""
    curve, tokenizer = {1: 1.0, 2: 1.3, 4: 1.6, 8: 2.2, 16: 4.0}, tokenizer_of(kind)
    grammar = Grammar(tokenizer, 8, 2)
    given = behind(bundle_for(tokenizer, 0), grammar, prompt(0, 1), costs={"words": curve})
    for said, counts in ((None, usual), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        decoder = load("decoder", "jacobi", ["head=words", *([] if said is None else [f"agreement={said}"])])
        assert decoder.agreement == said and decoder.agrees(grammar) == counts
        length = costs.best_length(curve, counts)
        assert [hint.length for hint in decoder.hints(given, "words")] == [length]
        assert decoder.decode(given).notes["window"] == length
    assert (costs.best_length(curve, usual) > 1) == (kind == "bins")


def test_tokens_that_do_not_divide_the_chunk_are_constrained() -> None:
    """Two values per token: of five, the last cannot be reached, and no token may pass for fitting there."""
    twos = SimpleNamespace(vocab_size=3, token_lengths=np.full(3, 2), valid_next=lambda left: np.full(3, left >= 2))
    logits, left = torch.zeros(1, 2, 3), [[3, 1]]
    assert Grammar(twos, 5, 1).constrain(logits, left)[0].tolist() == [[0.0] * 3, [-torch.inf] * 3]
    assert Grammar(twos, 6, 1).constrain(logits, [[4, 2]])[0].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("kind", ["bins", "fast"])
def test_numpy_and_torch_allow_choose_and_weigh_the_same(kind: str) -> None:
    """Passes on the host give numpy's arrays, others tensors."""
    grammar, rng = Grammar(tokenizer_of(kind), 8, 2), np.random.default_rng(0)
    logits = rng.normal(size=(1, 6, grammar.bias.shape[1])).astype(np.float32) * 40
    for rows, left in ((logits, [[16, 9, 5, 2, 1, 0]]), (logits[:, :1], [[3]])):
        here, there = grammar.constrain(rows, left), grammar.constrain(torch.from_numpy(rows), left)
        assert isinstance(here, np.ndarray) and np.array_equal(here, there.numpy())
        chosen = best_tokens(here)
        assert chosen == best_tokens(there) == there.argmax(-1).tolist()
        unlikely = [np.where(np.isfinite(here[0]), here[0], np.inf).argmin(axis=-1).tolist()]
        for ids in (chosen, unlikely, [row[:-1] for row in chosen]):
            for one, other in zip(probabilities([here], ids), probabilities([there], ids)):
                assert len(one) == len(ids[0]) and one == pytest.approx(other, abs=1e-6)
        assert np.array_equal(here, there.numpy())  # still what it was
    first = [[0] * 6]
    pieces = [logits[:, :2], torch.from_numpy(logits[:, 2:])]  # a short pass and one that was too long for the host
    assert probabilities(pieces, first) == probabilities([logits], first)
