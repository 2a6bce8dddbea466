"""FAST: parity with the public tokenizer, the bound of its error, and what any list of ids decodes to."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.fft import dct, idct
from tokenizers import Tokenizer

from vla.errors import BundleError, ConfigError, DataError
from vla.tokenizers import FastTokenizer, action_tokenizer_from_dict, valid_table

FAST_PLUS = Path(__file__).parents[1] / "fixtures" / "fast_plus"


def smooth_chunks(count: int, horizon: int, action_dim: int, seed: int) -> list[np.ndarray]:
    """Sums of a few slow cosines, about 1 in size: what actions of an arm look like."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0.0, 1.0, horizon)[:, None]
    chunks = []
    for _ in range(count):
        chunk = np.zeros((horizon, action_dim))
        for frequency in range(4):
            size, phase = rng.normal(size=action_dim) / (1 + frequency**2), rng.uniform(0, 6.3, action_dim)
            chunk += 0.5 * size * np.cos(np.pi * frequency * time + phase)
        chunks.append(chunk.astype(np.float32))
    return chunks


@pytest.fixture(scope="module")
def fast_plus() -> FastTokenizer:
    return FastTokenizer.load(FAST_PLUS)


@pytest.fixture(scope="module")
def fitted() -> FastTokenizer:
    return FastTokenizer.fit(smooth_chunks(300, 16, 7, seed=0), vocab_size=512, scale=10)


@pytest.fixture(params=["fast_plus", "fitted"])
def tokenizer(request) -> FastTokenizer:
    return request.getfixturevalue(request.param)


def test_equal_to_fast_plus_token_for_token(fast_plus):
    pairs = json.loads((FAST_PLUS / "parity.json").read_text())
    assert len(pairs) == 20
    for pair in pairs:
        actions = np.array(pair["actions"], np.float32)
        assert fast_plus.encode(actions) == pair["ids"]
        decoded, repaired = fast_plus.decode_report(pair["ids"], *actions.shape)
        assert repaired == 0
        assert decoded.dtype == np.float32
        np.testing.assert_allclose(decoded, pair["decoded"], atol=1e-6)


def test_whole_tokens_are_what_their_text_spells(tokenizer) -> None:
    """Looked up one by one, and spelled out as the reference does."""
    rng, whole = np.random.default_rng(0), np.flatnonzero(tokenizer.token_lengths)
    for count in (1, 5, 30):
        ids = rng.choice(whole, count).tolist()
        spelled, mended = tokenizer._mended(ids, 112)
        known = np.concatenate([tokenizer._integers[i] for i in ids])
        assert mended == 0 and np.array_equal(known, spelled)
        filled = np.zeros(112, np.int64)
        filled[: len(known)] = known[:112]
        decoded, repaired = tokenizer.decode_report(ids, 16, 7)
        expected = idct(filled.reshape(16, 7) / tokenizer.scale, axis=0, norm="ortho")
        assert repaired == abs(len(known) - 112)
        np.testing.assert_allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("size", [0.01, 1.0, 8.0])
def test_equal_to_the_published_procedure_on_new_chunks(fast_plus, size):
    """The reference in four lines, over the raw tokenizer file; large sizes reach the clamp at min_token."""
    raw = Tokenizer.from_file(str(FAST_PLUS / "tokenizer.json"))
    rng = np.random.default_rng(3)
    clamped = 0
    for horizon, action_dim in [(1, 1), (5, 7), (16, 8), (50, 14)]:
        actions = (size * rng.standard_normal((horizon, action_dim)) - 2 * size).astype(np.float32)
        rounded = np.around(dct(actions[None], axis=1, norm="ortho")[0] * 10)
        codes = np.maximum(rounded.flatten() + 354, 0).astype(int)
        clamped += int((codes == 0).sum())
        assert fast_plus.encode(actions) == raw.encode("".join(map(chr, codes))).ids
    assert (clamped > 0) == (size == 8.0)


@pytest.mark.parametrize("horizon", [1, 2, 5, 16, 33, 50])
@pytest.mark.parametrize("action_dim", [1, 7, 14])
def test_integers_round_trip_exactly(fast_plus, horizon, action_dim):
    integers = np.random.default_rng(horizon).integers(-60, 60, (horizon, action_dim))
    actions = idct(integers / 10, axis=0, norm="ortho").astype(np.float32)
    own = FastTokenizer.fit([actions], vocab_size=256, scale=10)
    for tokenizer in (fast_plus, own):
        decoded, repaired = tokenizer.decode_report(tokenizer.encode(actions), horizon, action_dim)
        assert repaired == 0
        assert np.array_equal(np.around(dct(decoded, axis=0, norm="ortho") * 10), integers)


def test_rms_error_within_half_a_step(tokenizer):
    for chunk in smooth_chunks(100, 16, 7, seed=0):
        decoded = tokenizer.decode(tokenizer.encode(chunk), *chunk.shape)
        rms = np.sqrt(np.mean((decoded - chunk) ** 2, axis=0))
        assert np.all(rms <= 0.5 / tokenizer.scale + 1e-6)


def test_missing_end_is_a_low_pass_filter(fitted):
    chunk = smooth_chunks(1, 16, 7, seed=0)[0]
    integers = np.around(dct(chunk, axis=0, norm="ortho") * 10)
    integers[5:] = 0
    expected = idct(integers / 10, axis=0, norm="ortho")
    decoded, repaired = fitted.decode_report(fitted.encode(idct(integers / 10, axis=0, norm="ortho")), 16, 7)
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    assert repaired == 0
    ones = np.flatnonzero(fitted.token_lengths == 1)
    short = [int(ones[0])] * 7  # all dimensions at frequency 0, the other 15 rows missing
    decoded, repaired = fitted.decode_report(short, 16, 7)
    assert repaired == 15 * 7
    np.testing.assert_allclose(decoded, np.broadcast_to(decoded[:1], (16, 7)), atol=1e-6)


def test_rows_are_frequencies():
    """A chunk with energy at frequency 0 only has its non-zero integers in the first A places."""
    chunk = np.tile(np.linspace(0.3, 0.9, 7, dtype=np.float32), (10, 1))
    tokenizer = FastTokenizer.fit([chunk], vocab_size=64, scale=10)
    text = "".join(tokenizer.to_dict()["vocab"][i] for i in tokenizer.encode(chunk))
    integers = np.array([ord(c) + tokenizer.min_token for c in text])
    assert len(integers) == 70
    assert np.all(integers[:7] > 0)
    assert not integers[7:].any()


def test_dimension_without_range_encodes_to_zero(tokenizer):
    chunk = smooth_chunks(1, 16, 7, seed=5)[0]
    chunk[:, 3] = 0.0
    decoded = tokenizer.decode(tokenizer.encode(chunk), 16, 7)
    assert np.array_equal(decoded[:, 3], np.zeros(16, np.float32))


def test_all_zero_chunks_can_be_fitted():
    zero = np.zeros((20, 7), np.float32)
    tokenizer = FastTokenizer.fit([zero], vocab_size=64, scale=10)
    ids = tokenizer.encode(zero)
    assert tokenizer.decode_report(ids, 20, 7)[1] == 0
    assert len(ids) < 20


def test_outside_the_fitted_range_is_clamped_not_dropped(fitted):
    """A BPE without unknown token drops characters it does not know; the chunk would shift without a word."""
    chunk = np.full((16, 7), 50.0, np.float32)
    ids = fitted.encode(chunk)
    decoded, repaired = fitted.decode_report(ids, 16, 7)
    assert repaired == 0
    np.testing.assert_allclose(decoded, fitted.upper / 10 / 4, atol=1e-6)  # frequency 0 of 16 steps: mean * sqrt(16)


def test_fit_learns_merges_and_keeps_every_integer(fitted):
    chunks = smooth_chunks(200, 16, 7, seed=0)
    mean = np.mean([len(fitted.encode(chunk)) for chunk in chunks])
    assert mean < 0.4 * 16 * 7
    assert np.count_nonzero(fitted.token_lengths == 1) == fitted.upper - fitted.lower + 1
    assert fitted.vocab_size == 512
    assert fitted.token_lengths.min() == 1


def test_fit_is_deterministic():
    chunks = smooth_chunks(80, 10, 7, seed=1)
    prints = {FastTokenizer.fit(chunks, vocab_size=300, scale=10).fingerprint() for _ in range(3)}
    assert len(prints) == 1


def bound(tokenizer: FastTokenizer, horizon: int) -> float:
    """The largest sum that T coefficients within the range can reach."""
    return max(-tokenizer.lower, tokenizer.upper) / tokenizer.scale * np.sqrt(2 * horizon) + 1e-3


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(-5, 2100), max_size=300),
    horizon=st.integers(1, 50),
    action_dim=st.integers(1, 14),
)
def test_any_ids_decode_to_finite_bounded_actions(tokenizer, ids, horizon, action_dim):
    decoded, repaired = tokenizer.decode_report(ids, horizon, action_dim)
    assert decoded.shape == (horizon, action_dim)
    assert decoded.dtype == np.float32
    assert np.all(np.isfinite(decoded))
    assert np.abs(decoded).max() <= bound(tokenizer, horizon)
    complete = sum(tokenizer.token_lengths[i] for i in ids if 0 <= i < tokenizer.vocab_size) == horizon * action_dim
    if not tokenizer.byte_level:
        unknown = any(not 0 <= i < tokenizer.vocab_size for i in ids)
        assert (repaired == 0) == (complete and not unknown)
    assert np.array_equal(tokenizer.decode(ids, horizon, action_dim), decoded)


def test_damaged_bytes_become_zero_and_count(fast_plus):
    """A lone lead byte reads as U+FFFD; taken as an integer it would be 65179, a violent action of the right length."""
    vocab = fast_plus.to_dict()["vocab"]
    lead = vocab.index("Å")
    decoded, repaired = fast_plus.decode_report([lead], 1, 1)
    assert decoded.tolist() == [[0.0]]
    assert repaired == 1


def test_two_byte_integers_outside_the_range_are_clamped(fast_plus):
    """The last two-byte character, U+07FF, is the integer 1693."""
    vocab = fast_plus.to_dict()["vocab"]
    ids = [vocab.index("ß"), vocab.index("¿")]
    decoded, repaired = fast_plus.decode_report(ids, 1, 1)
    np.testing.assert_allclose(decoded, [[35.4]], rtol=1e-6)
    assert repaired == 1


def test_no_state_between_calls(fast_plus, fitted):
    chunks = smooth_chunks(4, 16, 7, seed=7)
    for tokenizer in (fast_plus, fitted):
        before = tokenizer.fingerprint()
        alone = [tokenizer.encode(chunk) for chunk in chunks]
        decoded = tokenizer.decode(alone[0], 16, 7)
        tokenizer.encode(np.ones((50, 14), np.float32))
        tokenizer.decode([1, 2, 3], 9, 3)
        assert [tokenizer.encode(chunk) for chunk in reversed(chunks)] == alone[::-1]
        assert np.array_equal(tokenizer.decode(alone[0], 16, 7), decoded)
        assert tokenizer.fingerprint() == before


def test_random_walk_over_valid_tokens_is_a_complete_chunk(tokenizer):
    """What a constrained decoder does: whatever it picks among the valid tokens, nothing needs repair."""
    size = 10 * 7
    table = valid_table(tokenizer, size)
    rng = np.random.default_rng(0)
    for _ in range(50):
        remaining, ids = size, []
        while remaining:
            assert table[remaining].any()
            ids.append(int(rng.choice(np.flatnonzero(table[remaining]))))
            remaining -= int(tokenizer.token_lengths[ids[-1]])
        assert tokenizer.decode_report(ids, 10, 7)[1] == 0
    assert not table[0].any()


def test_fitted_encodings_are_always_valid(fitted):
    for chunk in smooth_chunks(50, 16, 7, seed=11):
        remaining = chunk.size
        for token in fitted.encode(chunk):
            assert fitted.valid_next(remaining)[token]
            remaining -= int(fitted.token_lengths[token])
        assert remaining == 0


def test_saved_and_plain_data_rebuild_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    data = json.loads(json.dumps(tokenizer.to_dict()))
    chunk = smooth_chunks(1, 20, 7, seed=2)[0]
    for again in (FastTokenizer.load(tmp_path / "tok"), action_tokenizer_from_dict(data)):
        assert again.fingerprint() == tokenizer.fingerprint()
        ids = again.encode(chunk)
        assert ids == tokenizer.encode(chunk)
        assert np.array_equal(again.decode(ids, 20, 7), tokenizer.decode(ids, 20, 7))
    assert sorted(p.name for p in (tmp_path / "tok").iterdir()) == ["processor_config.json", "tokenizer.json"]


def test_other_scale_has_another_fingerprint():
    chunks = smooth_chunks(20, 10, 7, seed=1)
    prints = {FastTokenizer.fit(chunks, vocab_size=700, scale=scale).fingerprint() for scale in (10, 20, 30)}
    assert len(prints) == 3


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json"])
def test_missing_and_truncated_files_name_themselves(fitted, tmp_path, file):
    fitted.save(tmp_path)
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=file):
        FastTokenizer.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=file):
        FastTokenizer.load(tmp_path)


def test_exchanged_merges_are_refused(fitted, tmp_path):
    other = FastTokenizer.fit(smooth_chunks(30, 16, 7, seed=9), vocab_size=512, scale=10)
    fitted.save(tmp_path / "a")
    other.save(tmp_path / "b")
    (tmp_path / "a" / "tokenizer.json").write_text((tmp_path / "b" / "tokenizer.json").read_text())
    with pytest.raises(DataError, match="sha256"):
        FastTokenizer.load(tmp_path / "a")


def test_bad_input_is_refused(fitted):
    with pytest.raises(DataError, match="finite"):
        fitted.encode(np.full((4, 7), np.nan, np.float32))
    with pytest.raises(DataError, match="shape"):
        fitted.encode(np.zeros(7, np.float32))
    with pytest.raises(ConfigError, match="horizon"):
        fitted.decode([1], 0, 7)
    with pytest.raises(DataError, match="chunks"):
        FastTokenizer.fit([], vocab_size=64, scale=10)
    with pytest.raises(ConfigError, match="vocab_size"):
        FastTokenizer.fit(smooth_chunks(20, 16, 7, seed=0), vocab_size=8, scale=10)
    with pytest.raises(ConfigError, match="scale"):
        FastTokenizer.fit(smooth_chunks(2, 16, 7, seed=0), vocab_size=512, scale=0)


def test_unknown_kind_and_unknown_keys_are_refused(fitted):
    with pytest.raises(BundleError, match="fast"):
        action_tokenizer_from_dict({"kind": "fsat"})
    with pytest.raises(BundleError, match="surprise"):
        action_tokenizer_from_dict(fitted.to_dict() | {"surprise": 1})
