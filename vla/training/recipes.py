"""What a person chooses about a training run. Plain data: configs construct it, bundles keep it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from vla.configs import Unbounded
from vla.errors import ConfigError, DataError, explain
from vla.models.transformer import TransformerConfig
from vla.models.vision import CameraEncoderConfig


@dataclass(frozen=True)
class ModelRecipe:
    """The part of ModelConfig that a person chooses; the rest follows from the data.

    cameras: encoders by camera, see `encoders`. transformer: with the backbone as its only expert; heads bring theirs.
    horizon: T. text_length: L, longest instruction in tokens. auxiliary weights: keyframe (state at the next gripper
    change) and chunk (the whole normalised chunk), read off the state token, and look (the states at the episode's
    first gripper changes), read off the points of the first camera if it has any; they teach the backbone where to look
    and are not used when acting. text_queries: see ModelConfig. registers: how many tokens replace the visual ones
    after register_layer layers (Victor, see vla.models.pruning); 0 for visual tokens in every layer.
    """

    cameras: tuple[CameraEncoderConfig, ...]
    transformer: TransformerConfig
    horizon: int = 16
    text_length: int = 24
    text_vocab: int = 384
    keyframe_weight: float = 0.5
    chunk_weight: float = 0.5
    look_weight: float = 2.0
    text_queries: int = 6
    registers: int = 0
    register_layer: int = 2

    def encoders(self, cameras: Sequence[str]) -> tuple[CameraEncoderConfig, ...]:
        """For a data set with `cameras`: the recipe's own if all of them are there. Else every camera has one, its own
        where the recipe names it. The recipe's first encoder, whose points look for what the words name, goes to the
        first camera without one if its own is not there; its last one to the others. DataError without cameras,
        ConfigError for a name that is nearly one of theirs."""
        if not cameras:
            raise DataError(explain("cameras of the data", "at least one", "none", "Record pictures, too."))
        for camera in self.cameras:
            if camera.name not in cameras and (near := difflib.get_close_matches(camera.name, cameras, 1, 0.8)):
                raise ConfigError(f"model.cameras: {camera.name!r} is no camera of the data. Did you mean {near[0]!r}?")
        known = {camera.name: camera for camera in self.cameras}
        if set(known) <= set(cameras):
            return self.cameras
        others = [name for name in cameras if name not in known]
        lead = self.cameras[0].name if self.cameras[0].name in cameras else (others or cameras)[0]
        made = {name: replace(self.cameras[0 if name == lead else -1], name=name) for name in others}
        return tuple((known | made)[name] for name in (lead, *(name for name in cameras if name != lead)))


@dataclass(frozen=True)
class TokenizerRecipe:
    """kind: "fast", fitted on the training chunks, "bins", or "fast_file" (a FAST folder at `path`)."""

    kind: str = "fast"
    vocab_size: int = 512
    scale: float = 10.0
    path: str = ""


@dataclass(frozen=True)
class DistillRecipe:
    """Consistency distillation of a token head (CEED-VLA).

    teacher: name of the head in `init` that this one starts from and learns from; "" for its own name, which then
    replaces it. frames: how many training frames it is asked about; the run sees no others. passes: the student learns
    from where it stands itself after 0 to `passes` - 1 Jacobi passes; around the cap it will be decoded with.
    consistency, anchor: weights of the two losses. tolerance: mixed labels, the teacher's tokens where its chunk is
    within this mean absolute difference of the demonstration (normalised units), else the demonstration's; 0 for the
    demonstration's only, infinity for the teacher's only. target: whose distributions behind the fixed point the
    consistency loss pulls towards: "own", the student's, as published, or "teacher", those of a teacher that stays
    beside it, which then also hold the student's own ones behind the fixed point (with the same weight).
    """

    teacher: str = ""
    frames: int = 20000
    passes: int = 12
    consistency: float = 1.0
    anchor: float = 1.0
    tolerance: Unbounded = 0.1
    target: str = "own"


@dataclass(frozen=True)
class HeadRecipe:
    """One head. kind, lookahead, exit_layer, noise_steps: see HeadConfig. tokenizer: of its actions, for kinds that
    make tokens.

    width, mlp_width: of the expert that runs it, 0 for the backbone itself. condition_width: of the vector that
    modulates that expert's norms (flow). weight: of its loss. distill: None for training from demonstrations alone.
    noise_repeats: noises and times per sample and step, at least 1 (hybrid; HybridVLA's `repeated_diffusion_steps`, 4
    in its release, which repeats the tokens too); the further ones are branches of T + 3 tokens each. noise_weight: of
    the noise's loss beside the tokens' (hybrid). They share an expert, and at 1, as released, the tokens' gradients are
    the larger ones by far.
    """

    kind: str
    tokenizer: TokenizerRecipe | None = None
    width: int = 128
    mlp_width: int = 384
    condition_width: int = 0
    lookahead: int = 0
    exit_layer: int = 0
    noise_steps: int = 100
    weight: float = 1.0
    distill: DistillRecipe | None = None
    noise_repeats: int = 1
    noise_weight: float = 1.0

    @property
    def target_head(self) -> str:
        """The head whose distributions this one is distilled to, "" for its own or none."""
        return self.distill.teacher if self.distill is not None and self.distill.target == "teacher" else ""


@dataclass(frozen=True)
class TrainConfig:
    """Arguments of `train`.

    data: folder of a LeRobotDataset. heads: by name. out: folder of the run (checkpoint, bundle, logs).
    steps, batch_size: of the optimiser. lr: peak; warm-up then cosine to lr * final_lr_share. ema: decay of the
    averaged weights, 0 for none. precision: "fp32" or "bf16" (autocast).
    val_fraction (share of episodes that validate), settle, early_steps, early_repeat, late_stride: see TrainingData.
    rollout_every: steps between rollouts, 0 for none. compile: torch.compile the loss (needs a C++ compiler; worth it
    for runs of more than half an hour). image_shift: random shift of training images in pixels.
    init: a bundle, folder or shipped name, whose backbone, text tokenizer and normalisation this run starts from, and
    those of its heads that are asked for here as they are there; "" for none. A head's tokenizer is then that of init,
    its FAST as it was fitted; one of another kind is refused. freeze: leave the backbone as it comes
    from init and train heads only; those of init that are not asked for stay in the bundle as they are.
    stop_step: end the run there, on the schedule of `steps`; 0 for never.
    look_steps: of a model with points, the first steps, which train only those, on the first frames of episodes: four
    times as fast, and from then on words point at objects. look_lr: learning rate of these steps.
    """

    data: str
    out: str
    model: ModelRecipe
    heads: Mapping[str, HeadRecipe]
    steps: int = 10000
    batch_size: int = 64
    lr: float = 1e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 200
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"
    device: str = "auto"
    seed: int = 0
    val_fraction: float = 0.03
    settle: int = 8
    early_steps: int = 0
    early_repeat: int = 1
    late_stride: int = 1
    init: str = ""
    freeze: bool = False
    stop_step: int = 0
    look_steps: int = 1000
    look_lr: float = 2.0e-3
    image_shift: int = 0
    log_every: int = 20
    val_every: int = 500
    val_batches: int = 8
    checkpoint_every: int = 500
    rollout_every: int = 0
    compile: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(explain("train.precision", "fp32 or bf16", self.precision, "Choose one of them."))
        if not self.heads:
            raise ConfigError(explain("train.heads", "at least one", "none", "Choose some, as in head=[fast]."))
        for name, head in self.heads.items():
            if head.noise_repeats < 1 or (head.noise_repeats > 1 and head.kind != "hybrid"):
                wanted = "at least 1" if head.kind == "hybrid" else f"1 for a head of kind {head.kind!r}"
                remedy = "Only a hybrid head's noise is repeated."
                raise ConfigError(explain(f"train.heads.{name}.noise_repeats", wanted, head.noise_repeats, remedy))
            if not 0 < head.noise_weight < float("inf") or (head.noise_weight != 1 and head.kind != "hybrid"):
                wanted = "above 0, finite" if head.kind == "hybrid" else f"1 for a head of kind {head.kind!r}"
                remedy = "Only a hybrid head has noise beside tokens."
                raise ConfigError(explain(f"train.heads.{name}.noise_weight", wanted, head.noise_weight, remedy))
            if head.distill is not None and (head.kind != "tokens" or not self.init or not self.freeze):
                raise ConfigError(
                    explain(f"train.heads.{name}.distill", "a token head, init=BUNDLE and freeze=true",
                            f"kind {head.kind}, init {self.init!r}, freeze {self.freeze}",
                            "Distill a head that was trained before.")
                )  # fmt: skip
            if head.distill is not None and min(head.distill.frames, head.distill.passes) < 1:
                raise ConfigError(
                    explain(f"train.heads.{name}.distill", "frames and passes of at least 1",
                            f"frames {head.distill.frames}, passes {head.distill.passes}", "Raise them.")
                )  # fmt: skip
            if head.distill is not None and head.distill.target not in ("own", "teacher"):
                where, got = f"train.heads.{name}.distill.target", repr(head.distill.target)
                raise ConfigError(explain(where, "own or teacher", got, "Choose one of them."))
            if head.distill is not None and head.distill.target == "teacher" and head.target_head in ("", *self.heads):
                where = f"train.heads.{name}.distill.target"
                got = f"teacher {head.target_head!r}, which this run changes"
                raise ConfigError(explain(where, "a teacher that stays as it is", got, "Take target=own."))
            for key in ("consistency", "anchor", "tolerance") if head.distill is not None else ():
                value = getattr(head.distill, key)
                if not value >= 0 or (value == float("inf") and key != "tolerance"):
                    wanted = "0 or more" if key == "tolerance" else "0 or more, finite"
                    where = f"train.heads.{name}.distill.{key}"
                    raise ConfigError(explain(where, wanted, value, "See vla.training.recipes.DistillRecipe."))
        if self.freeze and not self.init:
            raise ConfigError(explain("train.freeze", "init=BUNDLE with it", "no init", "Say whose backbone stays."))
        for key in ("steps", "batch_size", "log_every", "val_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ConfigError(explain(f"train.{key}", "at least 1", getattr(self, key), "Give a positive number."))

    def identity(self) -> dict[str, Any]:
        """What fixes the loss curve; a resume must agree on it."""
        data = asdict(self)
        for key in ("out", "device", "threads", "log_every", "val_every", "val_batches", "checkpoint_every",
                    "rollout_every", "compile", "stop_step"):  # fmt: skip
            del data[key]
        data["data"] = Path(self.data).name
        return json.loads(json.dumps(data))

    def changed(self, before: Mapping[str, Any]) -> list[str]:
        """Settings that differ from the identity of an earlier run; one that was unknown then stood at its default."""
        mine, theirs = self.identity(), _completed(before, self)
        return sorted(key for key in mine.keys() | before.keys() if mine.get(key) != theirs.get(key))


def _completed(before: Any, now: Any) -> Any:
    """Plain data of an earlier run, with the defaults of the fields that `now`, its like of today, has beside them."""
    if is_dataclass(now) and isinstance(before, Mapping):
        known = {f.name: getattr(now, f.name) for f in fields(now)}
        young = [f for f in fields(now) if f.name not in before and f.default is not MISSING]
        added = {f.name: json.loads(json.dumps(f.default, default=asdict)) for f in young}
        return {**added, **{key: _completed(value, known.get(key)) for key, value in before.items()}}
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        return {key: _completed(value, now.get(key)) for key, value in before.items()}
    if isinstance(now, tuple) and isinstance(before, list) and len(now) == len(before):
        return [_completed(*pair) for pair in zip(before, now)]
    return before


@dataclass(frozen=True)
class TrainReport:
    steps: int
    loss: float
    val_loss: float
    samples_per_s: float
    bundle: str
