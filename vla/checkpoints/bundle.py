"""A bundle: everything a policy needs, in one folder, complete or refused.

    bundle.json         family, format_version, model config, embodiment, normalisation, tokenizers, and sha256 hashes;
                        what the training data looks like, where that is known
    model.safetensors   weights (EMA weights when training kept them)

The config is plain data with unknown fields forbidden; it is rebuilt through CONSTRUCTORS below, never through a class
path from a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla.data.content import DataContent
from vla.data.normalize import Normalizer
from vla.embodiment import Embodiment
from vla.errors import BundleError, VlaError, explain, nearest
from vla.files import write_text
from vla.models.heads import HeadConfig
from vla.models.pruning import RegisterConfig
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.models.vision import CameraEncoderConfig
from vla.models.vla import ModelConfig, Vla
from vla.tokenizers import ActionTokenizer, action_tokenizer_from_dict
from vla.tokenizers.text import TextTokenizer

FORMAT_VERSION = 2
MARKER = "bundle.json"
WEIGHTS = "model.safetensors"
FAMILIES = ("vla",)
_KEYS = {
    "family", "format_version", "model", "embodiment", "state_normalizer", "action_normalizer", "action_tokenizers",
    "text_tokenizer", "observation_offsets", "training", "hashes",
}  # fmt: skip
# What the data looks like decides no chunk: it has a hash of its own, and a bundle that gets it stays the one it was.
DATA = "data"


@dataclass
class Bundle:
    """A model with all that turns observations into its inputs and its outputs into actions.

    action_tokenizers: by head, for the heads that make tokens. observation_offsets: past frames that the policy wants,
    in steps (0 is now). training: how it was made, plain data. data: what its training data looks like, None where that
    is not known.
    """

    model: Vla
    embodiment: Embodiment
    state_normalizer: Normalizer
    action_normalizer: Normalizer
    action_tokenizers: Mapping[str, ActionTokenizer]
    text_tokenizer: TextTokenizer
    observation_offsets: tuple[int, ...] = (0,)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    data: DataContent | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def check(self) -> Bundle:
        """Return self, or raise BundleError when parts do not fit each other."""
        config = self.config
        pairs = (
            ("state_dim", config.state_dim, self.embodiment.state_dim),
            ("state_normalizer", self.state_normalizer.dim, self.embodiment.state_dim),
            ("action_dim", config.action_dim, self.embodiment.action_dim),
            ("action_normalizer", self.action_normalizer.dim, self.embodiment.action_dim),
            ("action_tokenizers", sorted(self.action_tokenizers), sorted(h.name for h in config.heads if h.vocab)),
            ("text_vocab", config.text_vocab, self.text_tokenizer.vocab_size),
            ("text_length", config.text_length, self.text_tokenizer.max_length),
        )
        for key, got, expected in pairs:
            if got != expected:
                raise BundleError(explain(key, expected, got, "The parts of this bundle are from different models."))
        for head in config.heads:
            if not head.vocab:
                continue
            own = self.action_tokenizers[head.name]
            where = f"action_tokenizers.{head.name}"
            remedy = f"Copy the whole bundle again, or train heads.{head.name} anew with this tokenizer."
            if own.vocab_size != head.vocab:
                got = f"{own.vocab_size} tokens"
                raise BundleError(explain(where, f"the head's {head.vocab} tokens", got, remedy))
            if head.tokenizer and own.fingerprint() != head.tokenizer:
                wanted = f"the one that the head was trained with, {head.tokenizer[:12]}"
                raise BundleError(explain(where, wanted, own.fingerprint()[:12], remedy))
        for camera in config.cameras:
            if camera.name not in self.embodiment.camera_names:
                raise BundleError(
                    explain(
                        f"camera {camera.name!r}", "one of the embodiment's", self.embodiment.camera_names, "Retrain."
                    )
                )
        return self


def save(bundle: Bundle, path: str | Path) -> str:
    """Write the folder atomically (a temporary one beside it, then rename); returns the bundle's hash."""
    bundle.check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        content = {
            "family": "vla",
            "format_version": FORMAT_VERSION,
            "model": _plain(bundle.config),
            "embodiment": bundle.embodiment.to_dict(),
            "state_normalizer": bundle.state_normalizer.to_dict(),
            "action_normalizer": bundle.action_normalizer.to_dict(),
            "action_tokenizers": {name: item.to_dict() for name, item in bundle.action_tokenizers.items()},
            "text_tokenizer": bundle.text_tokenizer.to_dict(),
            "observation_offsets": list(bundle.observation_offsets),
            "training": _plain(bundle.training),
        }
        content["hashes"] = {WEIGHTS: _sha256_file(temporary / WEIGHTS), "content": _sha256_json(content)}
        if bundle.data is not None:
            _add_data(content, bundle.data)
        (temporary / MARKER).write_text(_text(content))
        # safetensors lets nobody else read what it writes: on a robot it is often another user who runs the policy.
        (temporary / WEIGHTS).chmod((temporary / MARKER).stat().st_mode)
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        if path.exists():
            # What stands beside the two files (a card, a curve) belongs to the user: keep it.
            for extra in path.iterdir():
                if extra.name not in (WEIGHTS, MARKER):
                    move = shutil.copytree if extra.is_dir() else shutil.copy2
                    move(extra, temporary / extra.name)
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(content["hashes"]["content"])


def describe_data(path: str | Path, data: DataContent) -> None:
    """Write what the training data looks like into a bundle folder, in place of what it says of it; the weights and the
    bundle's hash stay as they are. BundleError for a bundle that is not whole or has other cameras or state."""
    content = read_content(path)
    robot = Embodiment.from_dict(content["embodiment"])
    cameras = [camera["name"] for camera in content["model"]["cameras"]]
    if not set(data.cameras) <= set(cameras) or tuple(data.state) != robot.state_names:
        expected, got = (cameras, list(robot.state_names)), (list(data.cameras), list(data.state))
        remedy = "Take the data that it was trained on."
        raise BundleError(explain(f"{path}: cameras and state of the data", expected, got, remedy))
    _add_data(content, data)
    write_text(Path(path) / MARKER, _text(content))


def _add_data(content: dict[str, Any], data: DataContent) -> None:
    content[DATA] = data.to_dict()
    content["hashes"][DATA] = _sha256_json(content[DATA])


def read_data(path: str | Path) -> DataContent | None:
    """What the training data of a bundle folder looks like, without loading its weights; None where it is not known."""
    content = read_content(path)
    return DataContent.from_dict(content[DATA]) if DATA in content else None


def read_content(path: str | Path) -> dict[str, Any]:
    """bundle.json with its keys and hashes checked; the weights are hashed but not loaded."""
    path = Path(path)
    marker, weights = path / MARKER, path / WEIGHTS
    for file in (marker, weights):
        if not file.is_file():
            raise BundleError(explain(str(file), "a file", "nothing", "Copy the whole bundle folder again."))
    try:
        content = json.loads(marker.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(explain(str(marker), "JSON", f"unreadable ({error})", "Copy the bundle again.")) from error
    if not isinstance(content, dict):
        raise BundleError(explain(str(marker), "a mapping", type(content).__name__, "Copy the bundle again."))
    if content.get("family") not in FAMILIES:
        raise BundleError(
            f"{marker}: unknown family {content.get('family')!r}. {nearest(str(content.get('family')), FAMILIES)}"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            explain(f"{marker}: format_version", FORMAT_VERSION, content.get("format_version"), "Update vla-stack.")
        )
    _check_keys(str(marker), content, _KEYS | {DATA}, {DATA})
    body = {key: value for key, value in content.items() if key not in ("hashes", DATA)}
    for name, expected, got in (
        ("content", content["hashes"].get("content"), _sha256_json(body)),
        (WEIGHTS, content["hashes"].get(WEIGHTS), _sha256_file(weights)),
        (DATA, content["hashes"].get(DATA), _sha256_json(content[DATA]) if DATA in content else None),
    ):
        if expected != got:
            raise BundleError(
                explain(f"{path}: {name}", f"sha256 {expected}", got, "The bundle was changed or cut; copy it again.")
            )
    return content


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Rebuild a bundle, or raise BundleError saying what is wrong with it."""
    path = Path(path)
    content = read_content(path)
    try:
        config = _construct(ModelConfig, content["model"], "model")
        model = Vla(config)
        model.load_state_dict(load_file(path / WEIGHTS))
        bundle = Bundle(
            model.to(device).eval(),
            Embodiment.from_dict(content["embodiment"]),
            Normalizer.from_dict(content["state_normalizer"]),
            Normalizer.from_dict(content["action_normalizer"]),
            {name: action_tokenizer_from_dict(item) for name, item in content["action_tokenizers"].items()},
            TextTokenizer.from_dict(content["text_tokenizer"]),
            tuple(content["observation_offsets"]),
            content["training"],
            content["hashes"]["content"],
            DataContent.from_dict(content[DATA]) if DATA in content else None,
        )
        return bundle.check()
    except BundleError:
        raise
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, VlaError) as error:
        raise BundleError(explain(str(path), "a complete bundle", f"{error}", "Export or copy it again.")) from error


# ---- plain data ----
# Which dataclass a field holds. Only these can come out of a file.
CONSTRUCTORS: dict[tuple[type, str], type] = {
    (ModelConfig, "cameras"): CameraEncoderConfig,
    (ModelConfig, "transformer"): TransformerConfig,
    (ModelConfig, "heads"): HeadConfig,
    (ModelConfig, "registers"): RegisterConfig,
    (TransformerConfig, "experts"): ExpertConfig,
}

# Fields that are younger than the format. A bundle holds them only where they are not at their default, so older ones
# load, and what needs none of this is written as before.
YOUNGER = {(ModelConfig, "registers"), (HeadConfig, "tokenizer")}


def _construct(kind: type, data: Any, where: str) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(data, dict):
        raise BundleError(explain(where, f"the fields of {kind.__name__}", type(data).__name__, "Export it again."))
    _check_keys(where, data, names, {name for owner, name in YOUNGER if owner is kind})
    values = {}
    for key, value in data.items():
        inner = CONSTRUCTORS.get((kind, key))
        if inner is not None and isinstance(value, list):
            value = tuple(_construct(inner, item, f"{where}.{key}[{i}]") for i, item in enumerate(value))
        elif inner is not None and value is not None:
            value = _construct(inner, value, f"{where}.{key}")
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return kind(**values)


def _check_keys(where: str, data: Mapping[str, Any], known: set[str], optional: Collection[str] = ()) -> None:
    for key in data:
        if key not in known:
            raise BundleError(f"{where}: unknown key {key!r}. {nearest(key, known)}")
    missing = sorted(known - set(optional) - set(data))
    if missing:
        raise BundleError(explain(where, "all keys", f"no {missing}", "The bundle is incomplete; export it again."))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if (type(value), f.name) not in YOUNGER or getattr(value, f.name) != f.default
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _sha256_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
