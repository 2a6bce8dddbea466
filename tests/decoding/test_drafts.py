"""Tokens of a chunk that was decoded from tokens."""

import numpy as np

from vla.decoding.base import encoded_again
from vla.tokenizers import BinTokenizer, FastTokenizer


def test_bins_come_back_and_the_last_stands_for_the_value_that_two_share() -> None:
    """An open gripper is clipped to 1 and becomes the last bin: a draft with the one before would be wrong there."""
    tokenizer = BinTokenizer()
    ids = list(range(256))
    again = encoded_again(tokenizer, tokenizer.decode(ids, 64, 4))
    assert again == (*range(254), 255, 255)
    assert (
        encoded_again(tokenizer, np.ones((2, 3), np.float32)) == tuple(tokenizer.encode(np.ones((2, 3)))) == (255,) * 6
    )


def test_other_tokens_are_encoded_as_ever() -> None:
    chunks = np.random.default_rng(0).normal(size=(40, 8, 2)).cumsum(axis=1).astype(np.float32) / 4
    tokenizer = FastTokenizer.fit(chunks, vocab_size=96, scale=2.0)
    assert encoded_again(tokenizer, chunks[0]) == tuple(tokenizer.encode(chunks[0]))
