"""Instructions to ids: unseen words, padding, case, length, and a file in the public format."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from vla.errors import BundleError, ConfigError, DataError, ObservationError
from vla.tokenizers.text import TextTokenizer

TEXTS = [
    f"{verb} the {colour} {shape}"
    for verb in ("pick up", "push", "stack", "sort")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("cube", "ball", "cylinder")
]
FITTED = TextTokenizer.fit(TEXTS, vocab_size=400, max_length=24)
LONG = TextTokenizer.from_dict(FITTED.to_dict() | {"max_length": 400})


def test_known_words_are_single_tokens():
    assert len(FITTED.encode("pick up the yellow cylinder")) == 1 + 5


def test_unseen_words_still_encode_and_read_back():
    text = "balance the grey überkeg 抓"
    assert FITTED.decode(FITTED.encode(text)) == text
    assert FITTED.encode("push the red cube") != FITTED.encode("push the rad cube")


def test_case_spaces_and_underscores_do_not_matter():
    assert FITTED.encode("  Push_the  RED\tcube\n") == FITTED.encode("push the red cube")


@settings(deadline=None)
@given(st.text(max_size=20).filter(lambda text: text.replace("_", " ").strip()))
def test_any_text_encodes_inside_the_vocabulary(text):
    ids = LONG.encode(text)
    assert all(0 <= i < LONG.vocab_size for i in ids)
    assert LONG.pad_id not in ids


def test_markers_in_the_text_are_plain_text():
    ids = FITTED.encode("push <pad> <bos>")
    assert ids.count(FITTED.pad_id) == 0
    assert ids.count(ids[0]) == 1
    assert FITTED.decode(ids) == "push <pad> <bos>"


def test_padding_and_mask():
    ids, mask = FITTED.encode_padded(["push the red cube", "pick up the green ball"])
    assert ids.shape == mask.shape == (2, 24)
    assert mask.sum(axis=1).tolist() == [5, 6]
    assert np.all(ids[~mask] == FITTED.pad_id)
    assert ids[0, :5].tolist() == FITTED.encode("push the red cube")


@pytest.mark.parametrize("text", ["", "   ", "___", "x" * 10_000, "q z " * 40])
def test_empty_and_long_instructions_are_refused(text):
    with pytest.raises(ObservationError, match="instruction"):
        FITTED.encode(text)


def test_fit_ignores_order_and_repetition():
    again = TextTokenizer.fit(TEXTS[::-1] + TEXTS[:5], vocab_size=400, max_length=24)
    assert again.fingerprint() == FITTED.fingerprint()


def test_saved_and_plain_data_rebuild_the_same(tmp_path):
    FITTED.save(tmp_path)
    data = json.loads(json.dumps(FITTED.to_dict()))
    for again in (TextTokenizer.load(tmp_path), TextTokenizer.from_dict(data)):
        assert again.fingerprint() == FITTED.fingerprint()
        assert again.encode("sort the blue ball") == FITTED.encode("sort the blue ball")
        assert again.max_length == 24


def test_reads_a_public_tokenizer_file(tmp_path):
    """As a Llama or Gemma download: one tokenizer.json, its own padding token, with a truncation stored in it."""
    public = Tokenizer(models.WordLevel({"<unk>": 0, "[PAD]": 1, "Push": 2, "it": 3}, unk_token="<unk>"))
    public.pre_tokenizer = pre_tokenizers.Whitespace()
    public.enable_truncation(2)
    public.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = TextTokenizer.load(path, max_length=8, lower_case=False)
        assert tokenizer.encode("Push it Push it") == [2, 3, 2, 3]
        assert tokenizer.pad_id == 1
    with pytest.raises(ConfigError, match="pad_token"):
        TextTokenizer.load(tmp_path, pad_token="<nope>")


def test_bad_files_and_arguments_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size"):
        TextTokenizer.fit(TEXTS, vocab_size=100)
    with pytest.raises(DataError, match="texts"):
        TextTokenizer.fit([])
    with pytest.raises(BundleError, match="max_lenght"):
        TextTokenizer.from_dict(FITTED.to_dict() | {"max_lenght": 3})
