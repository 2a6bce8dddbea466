"""FAST action tokens: DCT, rounding, byte-pair merges (Pertsch et al., FAST, arXiv 2501.09747, section 4).

    float32[T, A] normalised -> orthonormal DCT-II along time -> round-half-even(scale * .) -> integers Z[T, A]
                             -> read row by row (all dimensions at frequency 0, then all at frequency 1, ...)
                             -> one character per integer -> BPE -> ids

The only loss is the rounding, so the RMS error of a dimension is at most 0.5 / scale (the transform is orthonormal).

Two kinds of merges go through the same code. The public FAST+ folder is a byte-level BPE: characters become one or two
bytes and the text is split by the GPT-2 expression first. What `fit` makes is a BPE over the integers themselves: every
integer of the fitted range is one character and one token, and nothing is split. The character of an integer z is
chr(z - min_token); `fit` chooses min_token so that the characters are CJK ideographs, 20992 consecutive code points
without surrogates, combining marks or white space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vla.errors import ConfigError, DataError, explain
from vla.files import write_text
from vla.tokenizers.files import canonical_sha256, check_keys, read_json

FORMAT_VERSION = 1
_FIRST_CHARACTER = 0x4E00
_CHARACTERS = 0x5200
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LAST_BEFORE_SURROGATES = 0xD7FF
_TOKENIZER_FILE, _CONFIG_FILE = "tokenizer.json", "processor_config.json"
_FIELDS = ("kind", "format_version", "scale", "min_token", "lower", "upper", "byte_level", "vocab", "merges")
_REMEDY = f"Point to a folder with {_TOKENIZER_FILE} and {_CONFIG_FILE}: the FAST+ download, or what save() wrote."


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE files: itself if printable, else 256, 257, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE = _byte_of_character()


class FastTokenizer:
    """Normalised chunks to FAST ids and back. Immutable: no call leaves anything behind.

    scale: integers per unit of a DCT coefficient (the paper's gamma). min_token: the integer of chr(0).
    lower, upper: the integers that `decode` lets through; others are clamped to them. A fitted tokenizer has the range
    seen in fitting, and `encode` clamps to it too, since other integers have no token. Public byte-level files do not
    record their range: `encode` clamps as the reference does (below min_token only), `decode` to +-|min_token|, for
    FAST+ +-354, that is +-35.4 in units of the orthonormal DCT. Damaged bytes decode to U+FFFD, which read as an
    integer would be 65179; they count as repaired and become 0.

    A dimension without range has no scale to be normalised with; the normaliser gives 0 for it, and 0 encodes to 0 at
    every frequency.
    """

    def __init__(
        self,
        *,
        scale: float,
        min_token: int,
        lower: int,
        upper: int,
        byte_level: bool,
        vocab: Sequence[str],
        merges: Sequence[Sequence[str]],
    ):
        if not (np.isfinite(scale) and scale > 0):
            raise ConfigError(explain("scale", "a number > 0", scale, "The paper uses 10."))
        if not lower <= 0 <= upper:
            raise ConfigError(
                explain("lower, upper", "a range around 0", (lower, upper), "Padding needs the integer 0.")
            )
        # an int stays an int: float32 * int keeps the products in the precision of the reference
        self.scale = int(scale) if float(scale).is_integer() else float(scale)
        self.min_token, self.lower, self.upper = int(min_token), int(lower), int(upper)
        self.byte_level = bool(byte_level)
        self._vocab = tuple(vocab)
        self._merges = tuple((str(left), str(right)) for left, right in merges)
        self.vocab_size = len(self._vocab)
        try:
            model = models.BPE(vocab={token: i for i, token in enumerate(self._vocab)}, merges=list(self._merges))
        except Exception as error:  # the library raises bare Exception for merges that name no token
            raise DataError(explain("merges", "pairs of known tokens", error, _REMEDY)) from error
        self._bpe = Tokenizer(model)
        if self.byte_level:
            self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            self._bpe.decoder = decoders.ByteLevel()
            self._pieces = [bytes(_BYTE[character] for character in token) for token in self._vocab]
        else:
            self._bpe.decoder = decoders.Fuse()
            self._pieces = [token.encode() for token in self._vocab]
        self.token_lengths = np.array([self._whole_length(piece) for piece in self._pieces], np.int64)
        self.token_lengths.setflags(write=False)
        # What a whole token stands for; () of one that has no meaning by itself.
        self._integers = [
            np.array([ord(c) + self.min_token for c in piece.decode()] if length else [], np.int64)
            for piece, length in zip(self._pieces, self.token_lengths)
        ]

    @classmethod
    def load(cls, path: str | Path) -> FastTokenizer:
        """Read the public FAST+ folder, or one that `save` wrote. DataError for missing, damaged or other files."""
        folder = Path(path)
        config = read_json(folder / _CONFIG_FILE, _REMEDY)
        data = read_json(folder / _TOKENIZER_FILE, _REMEDY)
        for key in ("scale", "min_token"):
            if isinstance(config.get(key), bool) or not isinstance(config.get(key), (int, float)):
                raise DataError(explain(f"{folder / _CONFIG_FILE}: {key}", "a number", config.get(key), _REMEDY))
        recorded = config.get("tokenizer_sha256")
        if recorded is not None:
            found = hashlib.sha256((folder / _TOKENIZER_FILE).read_bytes()).hexdigest()
            if found != recorded:
                raise DataError(explain(str(folder / _TOKENIZER_FILE), f"sha256 {recorded}", found, "Save it again."))
        model, splitter = data.get("model") or {}, data.get("pre_tokenizer") or {}
        if (
            model.get("type", "BPE") != "BPE"
            or not model.get("vocab")
            or splitter.get("type", "ByteLevel") != "ByteLevel"
        ):
            got = f"{model.get('type')} with {splitter.get('type')}"
            raise DataError(explain(str(folder / _TOKENIZER_FILE), "a BPE, plain or ByteLevel", got, _REMEDY))
        by_id = {index: token for token, index in model["vocab"].items()}
        if sorted(by_id) != list(range(len(by_id))):
            raise DataError(explain(f"{folder / _TOKENIZER_FILE}: vocab", "ids 0..N-1", "gaps", _REMEDY))
        vocab = [by_id[index] for index in range(len(by_id))]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        min_token, byte_level = int(config["min_token"]), bool(splitter)
        # without a recorded range the smallest integer of the fit is all that is known of it
        lower, upper = config.get("coefficient_range") or (-abs(min_token), abs(min_token))
        return cls(
            scale=config["scale"],
            min_token=min_token,
            lower=lower,
            upper=upper,
            byte_level=byte_level,
            vocab=vocab,
            merges=merges,
        )

    @classmethod
    def fit(cls, chunks: Iterable[np.ndarray], vocab_size: int = 1024, scale: float = 10) -> FastTokenizer:
        """Learn merges over integers from normalised chunks, float32[T, A] each (lengths and dimensions may differ).

        The paper fits 1024 tokens per data set, merges seen at least twice. Every integer between the smallest and the
        largest one seen (and 0) is a token of its own, so each chunk inside the range has an encoding.
        DataError: no chunks, NaN. ConfigError: vocab_size smaller than that alphabet.
        """
        chunks = list(chunks)
        if not chunks:
            raise DataError(explain("chunks", "at least one float32[T, A]", "none", "Collect demonstrations first."))
        if not (np.isfinite(scale) and scale > 0):
            raise ConfigError(explain("scale", "a number > 0", scale, "The paper uses 10."))
        scale = int(scale) if float(scale).is_integer() else float(scale)
        integers = [_quantise(chunk, scale).ravel() for chunk in chunks]
        lower = int(min(0, *(values.min() for values in integers)))
        upper = int(max(0, *(values.max() for values in integers)))
        alphabet = upper - lower + 1
        if alphabet > min(vocab_size, _CHARACTERS):
            raise ConfigError(
                explain(
                    "vocab_size",
                    f"at least {alphabet}, the integers in [{lower}, {upper}]",
                    vocab_size,
                    "Normalise the actions with their quantiles, lower scale, or raise vocab_size.",
                )
            )
        min_token = lower - _FIRST_CHARACTER
        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=10_000,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(z - min_token) for z in range(lower, upper + 1)],
        )
        bpe.train_from_iterator(("".join(map(chr, values - min_token)) for values in integers), trainer)
        model = json.loads(bpe.to_str())["model"]
        vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return cls(
            scale=scale, min_token=min_token, lower=lower, upper=upper, byte_level=False, vocab=vocab, merges=merges
        )

    def encode(self, actions: np.ndarray) -> list[int]:
        """float32[T, A], normalised -> ids. DataError for NaN, infinity or another shape."""
        codes = np.clip(self.integers(actions) - self.min_token, 0, _LAST_BEFORE_SURROGATES)
        return self._bpe.encode("".join(map(chr, codes.ravel())), add_special_tokens=False).ids

    def integers(self, actions: np.ndarray) -> np.ndarray:
        """float32[T, A], normalised -> int64[T, A], the rounded coefficients before merging; rows are frequencies."""
        integers = _quantise(actions, self.scale)
        return integers if self.byte_level else np.clip(integers, self.lower, self.upper)

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> np.ndarray:
        """Any ids -> finite, bounded float32[T, A], normalised; see `decode_report`."""
        return self.decode_report(ids, horizon, action_dim)[0]

    def decode_report(self, ids: Sequence[int], horizon: int, action_dim: int) -> tuple[np.ndarray, int]:
        """float32[T, A], normalised, and the number of repairs.

        Repairs, each counted once per token or integer: an id outside the vocabulary is skipped; damaged bytes and
        integers outside [lower, upper] become 0 and the nearest bound; a long list is cut; a short one is filled with
        zeros, which are its missing high frequencies.
        """
        if horizon < 1 or action_dim < 1:
            raise ConfigError(
                explain("horizon, action_dim", "integers >= 1", (horizon, action_dim), "Pass the chunk shape.")
            )
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        size = horizon * action_dim
        whole = [self._integers[i] for i in known]
        if whole and all(map(len, whole)):
            integers, mended = np.concatenate(whole), 0
        else:
            integers, mended = self._mended(known, size)
        repaired = len(ids) - len(known) + abs(len(integers) - size) + mended
        if len(integers) != size:
            integers = np.concatenate((integers[:size], np.zeros(max(0, size - len(integers)), np.int64)))
        # float64, as the reference decodes; only the result is float32
        coefficients = integers.reshape(horizon, action_dim) / self.scale
        return (synthesis(horizon) @ coefficients).astype(np.float32), repaired

    def valid_next(self, remaining: int) -> np.ndarray:
        """bool[vocab_size]: tokens of at most `remaining` integers; none when the chunk is complete.

        A byte-level vocabulary also has tokens that start or end inside a character. They have length 0 and are never
        valid here, so constrained decoding with FAST+ reaches every integer that has a token of its own (429 of them,
        -147..153 without a gap), not all that `encode` can write. A fitted vocabulary has no such tokens.
        """
        return (self.token_lengths > 0) & (self.token_lengths <= remaining)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "fast",
            "format_version": FORMAT_VERSION,
            "scale": self.scale,
            "min_token": self.min_token,
            "lower": self.lower,
            "upper": self.upper,
            "byte_level": self.byte_level,
            "vocab": list(self._vocab),
            "merges": [list(pair) for pair in self._merges],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FastTokenizer:
        """What `to_dict` wrote. BundleError names missing and unknown keys; DataError for another version."""
        check_keys(data, _FIELDS, "tokenizer")
        if data["kind"] != "fast" or data["format_version"] != FORMAT_VERSION:
            got = f"{data['kind']} version {data['format_version']}"
            raise DataError(explain("tokenizer", f"fast version {FORMAT_VERSION}", got, "Save it again."))
        return cls(**{key: data[key] for key in _FIELDS[2:]})

    def fingerprint(self) -> str:
        """sha256 of `to_dict`."""
        return canonical_sha256(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the folder that `load` reads, each file atomically; the second file holds the hash of the first."""
        folder = Path(path)
        text = self._bpe.to_str()
        config = {
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "min_token": self.min_token,
            "vocab_size": self.vocab_size,
            "coefficient_range": [self.lower, self.upper],
            "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        write_text(folder / _TOKENIZER_FILE, text)
        write_text(folder / _CONFIG_FILE, json.dumps(config, indent=2) + "\n")

    def _mended(self, ids: Sequence[int], size: int) -> tuple[np.ndarray, int]:
        """Integers of any known ids, and how many of the first `size` had to be mended."""
        text = b"".join([self._pieces[i] for i in ids]).decode("utf-8", errors="replace")
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        damaged = codes == ord(_REPLACEMENT)
        integers = np.where(damaged, 0, codes.astype(np.int64) + self.min_token)
        clamped = np.minimum(np.maximum(integers, self.lower), self.upper)
        return clamped, int(np.count_nonzero((damaged | (clamped != integers))[:size]))

    def _whole_length(self, piece: bytes) -> int:
        """Integers in a token; 0 when it cuts a character or holds an integer that decode would clamp."""
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            return 0
        return len(text) if all(self.lower <= ord(c) + self.min_token <= self.upper for c in text) else 0


@lru_cache(maxsize=8)
def synthesis(horizon: int) -> np.ndarray:
    """float64[T, T]: times coefficients [T, A] it gives actions, the inverse of the orthonormal DCT-II; its transpose
    is the transform. One product of a chunk is a sixth of a call of idct."""
    matrix: np.ndarray = idct(np.eye(horizon), axis=0, norm="ortho")
    matrix.setflags(write=False)
    return matrix


def _quantise(actions: np.ndarray, scale: float) -> np.ndarray:
    """float32[T, A] -> int64[T, A] rounded DCT coefficients, rows are frequencies."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or 0 in actions.shape:
        raise DataError(explain("actions", "float32[T, A], T and A >= 1", f"shape {actions.shape}", "Pass one chunk."))
    if not np.all(np.isfinite(actions)):
        raise DataError(
            explain("actions", "finite values", "NaN or infinity", "Check the normaliser and its statistics.")
        )
    # the batch axis selects the same vectorised transform as the reference: equal to the last bit before rounding
    coefficients = dct(np.asarray(actions, np.float32)[None], axis=1, norm="ortho")[0]
    return np.around(coefficients * scale).astype(np.int64)
