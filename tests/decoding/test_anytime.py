"""FAST tokens until the time is up: a prefix of greedy's, a low-passed chunk, never less than frequency 0."""

from itertools import count

import numpy as np
import pytest
import torch
from scipy.fft import dct, idct

from tests.contracts.test_decoders import model_of, prompt, tokenizer_of
from tests.decoding.test_continuous import bundle_of
from vla.configs import load
from vla.decoding import anytime
from vla.decoding.anytime import AnytimeDecoder
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import DecodeInput, Grammar, Hint
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix
from vla.policy import InferContext
from vla.tokenizers import BinTokenizer
from vla.types import ActionChunk

T, A = 8, 2
FAST = tokenizer_of("fast")
GRAMMAR = Grammar(FAST, T, A)
MODELS = [model_of(FAST, seed) for seed in range(4)]


@torch.inference_mode()
def decode(decoder, seed: int, batch: int = 1, deadline: float = float("inf"), row: int | None = None):
    images, *rest = prompt(seed, batch)
    if row is not None:
        images, rest = {k: v[row : row + 1] for k, v in images.items()}, [part[row : row + 1] for part in rest]
    model = MODELS[seed % len(MODELS)]
    suffix = TokenSuffix(model, model.prefix(model.prefix_segments(images, *rest), GRAMMAR.values), "words")
    return decoder.generate(suffix, GRAMMAR, [Hint(deadline=deadline)] * suffix.batch)


def length_of(ids) -> int:
    return sum(GRAMMAR.lengths[token] for token in ids)


@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_deadline_it_is_greedy(batch) -> None:
    for seed in range(8):
        greedy = decode(AutoregressiveDecoder(), seed, batch)
        out = decode(AnytimeDecoder(), seed, batch)
        assert out.ids == greedy.ids and out.passes == greedy.passes and out.notes == {"cut": [0.0] * batch}
        assert out.confidence == pytest.approx(greedy.confidence, abs=1e-5)
        assert out.ids == [decode(AnytimeDecoder(), seed, batch, row=row).ids[0] for row in range(batch)]


def test_at_every_deadline_it_is_a_prefix_of_greedy(monkeypatch) -> None:
    lengths = set()
    for seed in range(8):
        greedy = decode(AutoregressiveDecoder(), seed).ids[0]
        least = next(n for n in range(1, len(greedy) + 1) if length_of(greedy[:n]) >= A)
        for passes in range(-1, len(greedy) + 2):  # passes that the deadline leaves behind frequency 0
            monkeypatch.setattr(anytime, "clock", count().__next__)  # a second goes by at every look
            out = decode(AnytimeDecoder(), seed, deadline=float(passes))
            n = min(least + max(0, passes), len(greedy))
            assert out.ids == [greedy[:n]] and out.passes == n
            assert out.notes == {"cut": [float(T * A - length_of(greedy[:n]))]}
            lengths.add(n)
    assert len(lengths) > 4


def test_however_late_every_sample_has_frequency_0() -> None:
    late = AnytimeDecoder()
    several = 0
    for seed in range(12):
        for batch in (1, 3):
            out = decode(late, seed, batch, deadline=-1.0)
            assert all(length_of(ids) >= A for ids in out.ids)
            assert any(length_of(ids[:-1]) < A for ids in out.ids)  # and nobody waited for more
            several += out.passes > 1
    assert several  # one token is not always enough


def test_a_cut_list_is_not_a_damaged_one(monkeypatch) -> None:
    head = HeadConfig("words", "tokens", 1, FAST.vocab_size)
    policy = bundle_of(FAST, heads=(head,), horizon=T)
    width = policy.config.action_dim
    decoder = AnytimeDecoder(deadline_ms=20.0)
    decoder.check(policy)
    grammar = Grammar(FAST, T, width)
    for batch in (1, 2):
        images, text, valid, state = prompt(0, batch)
        given = []
        for _ in range(3):
            segments = policy.model.prefix_segments(images, text % policy.config.text_vocab, valid, state)
            with torch.inference_mode():
                prefix = policy.model.prefix(segments, policy.config.suffix_room)
            context = [InferContext()] * batch
            given.append(DecodeInput(policy, prefix, range(batch), context, lambda head: grammar, started=100.0))
        greedy = AutoregressiveDecoder().decode(given[0])
        monkeypatch.setattr(anytime, "clock", lambda: 100.019)  # the time counts from the start of the inference
        whole = decoder.decode(given[1])
        assert whole.ids == greedy.ids and np.array_equal(whole.actions, greedy.actions) and not any(whole.notes["cut"])
        monkeypatch.setattr(anytime, "clock", lambda: 100.021)
        cut = decoder.decode(given[2])
        missing = [grammar.before_each(T * width, ids)[-1] for ids in cut.ids]
        assert cut.notes == {"cut": missing} and sum(missing) > 0
        assert cut.repaired == [0] * batch
        for ids, longer, actions in zip(cut.ids, greedy.ids, cut.actions):
            assert ids == longer[: len(ids)]
            assert np.array_equal(actions, FAST.decode(list(ids), T, width))


@pytest.mark.parametrize("rest", ["previous", "zeros"])
def test_what_is_missing_comes_from_the_last_chunk(rest: str, monkeypatch) -> None:
    """Of the last chunk at its present place, the frequencies that were not decoded, and no others."""
    policy = bundle_of(FAST, heads=(HeadConfig("words", "tokens", 1, FAST.vocab_size),), horizon=T)
    width, rng = policy.config.action_dim, np.random.default_rng(0)
    grammar, decoder = Grammar(FAST, T, width), AnytimeDecoder(deadline_ms=20.0, rest=rest)
    images, text, valid, state = prompt(0, 2)
    segments = policy.model.prefix_segments(images, text % policy.config.text_vocab, valid, state)
    with torch.inference_mode():
        prefix = policy.model.prefix(segments, policy.config.suffix_room)
    last = ActionChunk(rng.normal(size=(T, width)).astype(np.float32), 0, 0.05)
    contexts = [InferContext(last, 3, None, 1, 0), InferContext()]
    given = DecodeInput(policy, prefix, range(2), contexts, lambda head: grammar, started=100.0)
    monkeypatch.setattr(anytime, "clock", lambda: 100.021)
    out = decoder.decode(given)
    plain = [FAST.decode(list(ids), T, width) for ids in out.ids]
    assert all(cut > 0 for cut in out.notes["cut"]) and np.array_equal(out.actions[1], plain[1])  # nothing is running
    if rest == "zeros":
        assert np.array_equal(out.actions[0], plain[0])
        return
    done = T * width - int(out.notes["cut"][0])
    added = dct(out.actions[0] - plain[0], axis=0, norm="ortho").ravel()
    there = dct(given.previous[0], axis=0, norm="ortho").ravel()
    assert np.allclose(added[:done], 0, atol=1e-5) and np.allclose(added[done:], there[done:], atol=1e-5)
    assert np.abs(there[done:]).max() > 0.1


def prefix_errors(tokenizer, ids, horizon: int, action_dim: int) -> np.ndarray:
    """float32[len(ids)]: rms difference between the chunk of the first i + 1 tokens and that of all."""
    chunks = [tokenizer.decode(list(ids[: count + 1]), horizon, action_dim) for count in range(len(ids))]
    return np.array([np.sqrt(np.mean((chunk - chunks[-1]) ** 2)) for chunk in chunks], np.float32)


def smooth(seed: int) -> np.ndarray:
    phase, speed = np.random.default_rng(seed).uniform(0, 6, (2, A))
    return np.sin(phase + np.linspace(0, 1, T)[:, None] * speed).astype(np.float32)


def chunks():
    rng = np.random.default_rng(1)
    yield from (smooth(seed) for seed in range(10))
    yield from (rng.uniform(-1, 1, (T, A)).astype(np.float32) for _ in range(10))


def test_a_prefix_is_the_chunk_without_its_later_coefficients() -> None:
    for chunk in chunks():
        ids = FAST.encode(chunk)
        whole = dct(FAST.decode(ids, T, A), axis=0, norm="ortho").ravel()
        for n in range(len(ids) + 1):
            kept = np.where(np.arange(T * A) < length_of(ids[:n]), whole, 0).reshape(T, A)
            assert FAST.decode(ids[:n], T, A) == pytest.approx(idct(kept, axis=0, norm="ortho"), abs=1e-5)
        least = next(n for n in range(1, len(ids) + 1) if length_of(ids[:n]) >= A)
        if length_of(ids[:least]) == A:  # frequency 0 alone: every action is the chunk's mean
            mean = FAST.decode(ids, T, A).mean(axis=0, keepdims=True)
            assert FAST.decode(ids[:least], T, A) == pytest.approx(np.repeat(mean, T, axis=0), abs=1e-5)


def test_the_error_of_a_prefix_is_the_energy_cut_off_and_never_grows() -> None:
    for chunk in chunks():
        ids = FAST.encode(chunk)
        errors = prefix_errors(FAST, ids, T, A)
        assert errors.shape == (len(ids),) and errors.dtype == np.float32 and errors[-1] == 0
        assert (np.diff(errors) < 1e-6).all()
        energy = dct(FAST.decode(ids, T, A), axis=0, norm="ortho").ravel() ** 2
        cut = [energy[length_of(ids[: n + 1]) :].sum() / (T * A) for n in range(len(ids))]
        assert errors == pytest.approx(np.sqrt(cut), abs=1e-5)


def test_half_of_a_smooth_chunk_is_nearly_all_of_it_in_frequencies_and_half_in_time() -> None:
    bins = BinTokenizer(256)
    early = []
    for seed in range(10):
        ids, values = FAST.encode(smooth(seed)), bins.encode(smooth(seed))
        n = next(n for n in range(len(ids)) if length_of(ids[: n + 1]) >= T * A // 2)
        early.append((prefix_errors(FAST, ids, T, A)[n], prefix_errors(bins, values, T, A)[T * A // 2 - 1]))
    fast, plain = np.mean(early, axis=0)
    assert fast < 0.1 < 0.3 < plain


def test_an_error_curve_needs_no_complete_list() -> None:
    ids = FAST.encode(smooth(0))[:-1]
    assert prefix_errors(FAST, ids, T, A)[-1] == 0


def test_what_cannot_be_cut_is_refused() -> None:
    words = HeadConfig("words", "tokens", 1, 9)
    with pytest.raises(ConfigError, match=r"decoder\.head: .*over fast, got words.*over bins.*,fast\]"):
        AnytimeDecoder().check(bundle_of(BinTokenizer(9), heads=(words,)))
    with pytest.raises(ConfigError, match=r"decoder\.head"):
        AnytimeDecoder(head="flow").check(bundle_of(BinTokenizer(9), heads=(words,)))
    for deadline in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"decoder\.deadline_ms"):
            AnytimeDecoder(deadline)
    assert not AnytimeDecoder().exact
    assert load("decoder", "anytime", ["deadline_ms=.inf"]).deadline_ms == float("inf")
