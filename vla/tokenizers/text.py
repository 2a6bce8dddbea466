"""Instructions to ids for the backbone: a byte-level BPE fitted on the training instructions, or a public one.

Bytes are the alphabet, so words that fitting never saw still have ids; a word seen twice usually is one token.
`load` also reads a Gemma or Llama `tokenizer.json`: only the padding token and the case rule differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vla.errors import ConfigError, DataError, ObservationError, explain
from vla.files import write_text
from vla.tokenizers.files import canonical_sha256, check_keys, read_json
from vla.types import check_instruction

FORMAT_VERSION = 1
DEFAULT_MAX_LENGTH = 48
PAD, BOS = "<pad>", "<bos>"
_PAD_CANDIDATES = (PAD, "<|finetune_right_pad_id|>", "<|pad|>", "[PAD]", "<unk>", "</s>")
_TOKENIZER_FILE, _CONFIG_FILE = "tokenizer.json", "text_tokenizer.json"
_FIELDS = ("kind", "format_version", "max_length", "pad_token", "lower_case", "tokenizer")
_REMEDY = f"Point to a {_TOKENIZER_FILE}, or to a folder that has one."


class TextTokenizer:
    """Deterministic text to ids. Immutable.

    definition: the content of a `tokenizer.json`. max_length: L, ids per instruction, begin marker included.
    lower_case: fold case before encoding (pi0-FAST's prompt does; a cased language model may want it off).
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        pad_token: str = PAD,
        lower_case: bool = True,
    ):
        if max_length < 1:
            raise ConfigError(
                explain("max_length", "an integer >= 1", max_length, f"{DEFAULT_MAX_LENGTH} fits a sentence.")
            )
        self._definition = dict(definition)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(self._definition))
        except Exception as error:  # the library raises bare Exception
            raise DataError(explain("tokenizer", "a tokenizers definition", error, _REMEDY)) from error
        # lengths are this class's matter: a truncation stored in the file would cut instructions silently
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # an instruction that contains "<pad>" is text, not a marker
        self._tokenizer.encode_special_tokens = True
        pad_id = self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise ConfigError(
                explain("pad_token", "a token of the vocabulary", repr(pad_token), "Name its padding token.")
            )
        self.pad_id, self.pad_token = int(pad_id), pad_token
        self.max_length, self.lower_case = int(max_length), bool(lower_case)
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int = 512, max_length: int = DEFAULT_MAX_LENGTH) -> TextTokenizer:
        """Learn merges from instructions. 256 bytes and two markers are always in; vocab_size is an upper bound."""
        smallest = 256 + 2
        if vocab_size < smallest:
            raise ConfigError(
                explain("vocab_size", f"at least {smallest}", vocab_size, "256 bytes and 2 markers come first.")
            )
        # sorted and unique: the order and the number of episodes must not change the ids
        lines = sorted({_clean(text, lower_case=True) for text in texts})
        if not lines:
            raise DataError(explain("texts", "at least one instruction", "none", "Collect demonstrations first."))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            show_progress=False,
            special_tokens=[PAD, BOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(lines, trainer)
        bos = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
        return cls(json.loads(tokenizer.to_str()), max_length=max_length)

    def encode(self, text: str) -> list[int]:
        """Ids of one instruction, begin marker first, not padded. ObservationError when empty or over max_length."""
        ids = self._tokenizer.encode(_clean(text, self.lower_case)).ids
        if len(ids) > self.max_length:
            raise ObservationError(
                explain(
                    "instruction", f"at most {self.max_length} tokens", f"{len(ids)} tokens", "Say it in fewer words."
                )
            )
        return ids

    def encode_padded(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Instructions -> ids int64[B, L], right-padded with pad_id, and mask bool[B, L], True at real tokens."""
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int64)
        mask = np.zeros((len(texts), self.max_length), bool)
        for row, text in enumerate(texts):
            tokens = self.encode(text)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Ids back to cleaned text, markers and padding left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "format_version": FORMAT_VERSION,
            "max_length": self.max_length,
            "pad_token": self.pad_token,
            "lower_case": self.lower_case,
            "tokenizer": self._definition,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TextTokenizer:
        check_keys(data, _FIELDS, "text_tokenizer")
        if data["kind"] != "text" or data["format_version"] != FORMAT_VERSION:
            got = f"{data['kind']} version {data['format_version']}"
            raise DataError(explain("text_tokenizer", f"text version {FORMAT_VERSION}", got, "Save it again."))
        return cls(
            data["tokenizer"],
            max_length=data["max_length"],
            pad_token=data["pad_token"],
            lower_case=data["lower_case"],
        )

    def fingerprint(self) -> str:
        """sha256 of `to_dict`."""
        return canonical_sha256(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write one file into a folder, atomically."""
        write_text(Path(path) / _CONFIG_FILE, json.dumps(self.to_dict(), ensure_ascii=False) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        pad_token: str | None = None,
        lower_case: bool = True,
    ) -> TextTokenizer:
        """A folder that `save` wrote; else a public `tokenizer.json` (file or its folder), which takes the options.

        pad_token None takes the first known padding token of the vocabulary.
        """
        path = Path(path)
        if (path / _CONFIG_FILE).is_file():
            return cls.from_dict(read_json(path / _CONFIG_FILE, _REMEDY))
        definition = read_json(path / _TOKENIZER_FILE if path.is_dir() else path, _REMEDY)
        if pad_token is None:
            pad_token = _find_pad(definition)
        return cls(definition, max_length=max_length, pad_token=pad_token, lower_case=lower_case)


def _find_pad(definition: Mapping[str, Any]) -> str:
    model = definition.get("model") or {}
    vocab = model.get("vocab") or {}
    # unigram files list [token, score] pairs
    known = set(vocab) if isinstance(vocab, Mapping) else {entry[0] for entry in vocab}
    known |= {token["content"] for token in definition.get("added_tokens") or ()}
    for candidate in _PAD_CANDIDATES:
        if candidate in known:
            return candidate
    raise ConfigError(explain("pad_token", f"one of {_PAD_CANDIDATES}", "none of them", "Pass pad_token."))


def _clean(text: str, lower_case: bool) -> str:
    """Underscores and runs of white space to one space, ends stripped; refuses what is empty or far too long."""
    text = " ".join(check_instruction(text).replace("_", " ").split())
    # a text of underscores only is as empty as one of spaces
    check_instruction(text)
    return text.lower() if lower_case else text
