"""Uniform bins: the published convention, its error bound, and any ids."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import ConfigError, DataError
from vla.tokenizers import ActionTokenizer, BinTokenizer, FastTokenizer, action_tokenizer_from_dict

BINS = BinTokenizer()


def test_follows_the_openvla_convention():
    """np.digitize over 256 edges, and the 255 centres between them, indexed from 1 and cut to the last centre."""
    values = np.random.default_rng(0).uniform(-1.3, 1.3, (50, 7)).astype(np.float32)
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    digits = np.digitize(np.clip(values, -1, 1), edges)
    assert BINS.encode(values) == (digits - 1).flatten().tolist()
    expected = centres[np.clip(digits - 1, 0, 254)].astype(np.float32)
    assert np.array_equal(BINS.decode(BINS.encode(values), 50, 7), expected)


def test_ends_and_middle():
    assert BINS.encode(np.array([[-1.0, 0.0, 1.0, 5.0, -5.0]])) == [0, 127, 255, 255, 0]
    assert BINS.decode([254], 1, 1) == BINS.decode([255], 1, 1)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_error_is_at_most_half_an_interval(values):
    actions = np.array(values, np.float32)[:, None]
    decoded, repaired = BINS.decode_report(BINS.encode(actions), len(values), 1)
    assert repaired == 0
    assert np.abs(decoded - actions).max() <= 1 / 255 + 1e-6


@settings(deadline=None)
@given(st.lists(st.integers(-300, 600), max_size=60), st.integers(1, 8), st.integers(1, 7))
def test_any_ids_decode_inside_the_range(ids, horizon, action_dim):
    decoded, repaired = BINS.decode_report(ids, horizon, action_dim)
    size = horizon * action_dim
    unknown = sum(not 0 <= i < 256 for i in ids[:size])
    assert repaired == unknown + abs(len(ids) - size)
    assert decoded.shape == (horizon, action_dim)
    assert np.abs(decoded).max() < 1


def test_every_bin_is_valid_until_the_chunk_is_complete():
    assert BINS.valid_next(1).all()
    assert not BINS.valid_next(0).any()
    assert BINS.token_lengths.tolist() == [1] * 256


def test_saved_and_plain_data_rebuild_the_same(tmp_path):
    BINS.save(tmp_path)
    data = json.loads(json.dumps(BINS.to_dict()))
    for again in (BinTokenizer.load(tmp_path), action_tokenizer_from_dict(data)):
        assert again.fingerprint() == BINS.fingerprint()
    assert BinTokenizer(128).fingerprint() != BINS.fingerprint()


def test_both_fulfil_the_protocol():
    fast = FastTokenizer.fit([np.zeros((2, 2), np.float32)], vocab_size=8, scale=10)
    for tokenizer in (BINS, fast):
        assert isinstance(tokenizer, ActionTokenizer)
        assert tokenizer.token_lengths.shape == (tokenizer.vocab_size,)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(DataError, match="finite"):
        BINS.encode(np.array([[np.inf]]))
    with pytest.raises(DataError, match="shape"):
        BINS.encode(np.zeros(3))
    with pytest.raises(ConfigError, match="vocab_size"):
        BinTokenizer(1)
    with pytest.raises(DataError, match=r"bins\.json"):
        BinTokenizer.load(tmp_path)
