"""Training: one loop for CPU and GPU, resumable to the same loss curve.

What a step sees is a function of (seed, step), and a checkpoint holds weights, optimiser, averaged weights and the
step; a killed run therefore continues as if it had not been killed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.checkpoints import bundle as bundles
from vla.checkpoints.bundle import Bundle
from vla.data.lerobot import LeRobotDataset
from vla.decoding.base import Grammar
from vla.errors import ConfigError, DataError, explain
from vla.files import exclusive, replacing
from vla.models.heads import HeadConfig
from vla.models.pruning import RegisterConfig
from vla.models.transformer import ExpertConfig
from vla.models.vla import ModelConfig, Vla
from vla.resources import bundle_path
from vla.tokenizers import ActionTokenizer, BinTokenizer, FastTokenizer
from vla.tokenizers.text import TextTokenizer
from vla.training import objectives
from vla.training.branches import branches, draw
from vla.training.dataset import LOOKS, Batch, TrainingData, sample_frames
from vla.training.distillation import FixedPoints, collect, iterate, way
from vla.training.recipes import TokenizerRecipe, TrainConfig, TrainReport
from vla.training.start import take_weights, train_heads_only

Rollout = Callable[[Bundle, int], dict[str, float]]
Log = Callable[[dict[str, Any]], None]


class Trainer:
    """One run. `run()` trains to the end; tests drive `step()`."""

    def __init__(self, config: TrainConfig, log: Log | None = None, rollout: Rollout | None = None):
        self.config, self._log, self._rollout = config, log or (lambda row: None), rollout
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = torch.device(
            config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        dataset = LeRobotDataset(config.data)
        recipe = config.model
        self.data = TrainingData(
            dataset, recipe.horizon, config.val_fraction, config.settle, config.early_steps, config.early_repeat,
            config.late_stride,
        )  # fmt: skip
        start = self._start_bundle()
        if start is not None:
            self.data.use_normalizers(start.state_normalizer, start.action_normalizer)
            self.text_tokenizer = start.text_tokenizer
        else:
            self.text_tokenizer = TextTokenizer.fit(dataset.tasks, recipe.text_vocab, recipe.text_length)
        known = {} if start is None else start.action_tokenizers
        teachers = {name: head.distill.teacher or name for name, head in config.heads.items() if head.distill}
        self.tokenizers: dict[str, ActionTokenizer] = {
            name: self._tokenizer(name, head.tokenizer, known.get(teachers.get(name, name)))
            for name, head in config.heads.items()
            if head.tokenizer is not None
        }
        self.cameras = recipe.encoders(dataset.cameras)
        sizes = {camera.name: (camera.size, camera.size) for camera in self.cameras}
        self.data.prepare(
            self.tokenizers, self.text_tokenizer, sizes,
            lambda done, total: self._log({"event": "frames", "done": done, "total": total}),
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.model = Vla(self._model_config(start)).to(self.device)
        self._before = None if start is None else start.training
        if start is not None:
            self.taken = take_weights(self.model, start.model, teachers)
            if config.freeze and self.model.config.registers != start.config.registers:
                raise ConfigError(
                    explain("train.freeze", "registers that init has", "new ones, which every head would see",
                            "Train them with freeze=false first.")
                )  # fmt: skip
        if config.freeze:
            train_heads_only(self.model, list(config.heads))
        self.taught = self._ask_teachers(start)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed, rest = [p for p in self.trained if p.ndim > 1], [p for p in self.trained if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.step_number = 0
        looks = self.model.look is not None and len(self.data.first_frames) > 0 and not config.freeze
        self.look_steps = config.look_steps if looks else 0
        if self.look_steps >= config.steps:
            raise ConfigError(
                explain("train.look_steps", f"fewer than steps={config.steps}", self.look_steps,
                        "Lower it, or no step is left that trains actions.")
            )  # fmt: skip
        self._loss: Callable[..., dict[str, Tensor]] = self._losses
        self._look_loss: Callable[..., dict[str, Tensor]] = self._look_losses
        if config.compile:
            self._loss = torch.compile(self._losses, dynamic=False)
            self._look_loss = torch.compile(self._look_losses, dynamic=False)

    # ---- parts ----
    def _start_bundle(self) -> Bundle | None:
        if not self.config.init:
            return None
        start = bundles.load(bundle_path(self.config.init))
        self.data.embodiment.require_same(
            start.embodiment, f"data {self.config.data} and init {self.config.init}", "Start without init."
        )
        return start

    def _tokenizer(self, head: str, recipe: TokenizerRecipe, known: ActionTokenizer | None) -> ActionTokenizer:
        """`known`, that of the head in init, where there is one: what the recipe asks for may not be another kind."""
        if known is None:
            return self._make_tokenizer(head, recipe)
        if recipe.kind in ("bins", "fast"):  # a FAST that is fitted anew would never be the same
            same = isinstance(known, BinTokenizer if recipe.kind == "bins" else FastTokenizer)
        else:
            same = self._make_tokenizer(head, recipe).fingerprint() == known.fingerprint()
        if not same:
            asked = " ".join(filter(None, (recipe.kind, recipe.path)))
            remedy = "Choose the same kind, another name for the head, or start without init."
            raise ConfigError(explain(f"heads.{head}.tokenizer", f"init's {type(known).__name__}", asked, remedy))
        return known

    def _make_tokenizer(self, head: str, recipe: TokenizerRecipe) -> ActionTokenizer:
        if recipe.kind == "bins":
            return BinTokenizer()
        if recipe.kind == "fast_file":
            return FastTokenizer.load(recipe.path)
        if recipe.kind != "fast":
            raise ConfigError(
                explain(f"heads.{head}.tokenizer.kind", "fast, bins or fast_file", recipe.kind, "Choose one of them.")
            )
        frames = self.data.train_frames
        sample = frames[:: max(1, len(frames) // 100_000)]  # enough to learn merges from, and it bounds the memory
        return FastTokenizer.fit(self.data.chunks(sample), recipe.vocab_size, recipe.scale)

    def _model_config(self, start: Bundle | None) -> ModelConfig:
        """With a frozen backbone, heads of `start` that this run does not train stay in the bundle as they are.

        They come first: what a policy does by default does not change because it learned something more.
        """
        recipe, embodiment = self.config.model, self.data.embodiment
        auxiliary = {}
        if recipe.keyframe_weight:
            auxiliary["keyframe"] = embodiment.state_dim
        if recipe.chunk_weight:
            auxiliary["chunk"] = recipe.horizon * embodiment.action_dim
        experts, heads, kept = list(recipe.transformer.experts[:1]), [], []
        for name, head in self.config.heads.items():
            if head.width:
                experts.append(ExpertConfig(head.width, head.mlp_width, head.condition_width))
            own = self.tokenizers.get(name)
            heads.append(
                HeadConfig(name, head.kind, len(experts) - 1 if head.width else 0, own.vocab_size if own else 0,
                           head.lookahead, head.exit_layer, head.noise_steps, own.fingerprint() if own else "")
            )  # fmt: skip
        for other in start.config.heads if start is not None and self.config.freeze else ():
            if other.name not in self.config.heads:
                if other.expert:
                    experts.append(start.config.transformer.experts[other.expert])
                kept.append(replace(other, expert=len(experts) - 1 if other.expert else 0))
                if other.vocab:
                    self.tokenizers[other.name] = start.action_tokenizers[other.name]
        return ModelConfig(
            self.cameras, replace(recipe.transformer, experts=tuple(experts)), embodiment.state_dim,
            embodiment.action_dim, recipe.horizon,
            self.text_tokenizer.vocab_size, recipe.text_length, (*kept, *heads), auxiliary, recipe.text_queries,
            LOOKS * embodiment.state_dim if recipe.look_weight and self.cameras[0].points else 0,
            RegisterConfig(recipe.registers, recipe.register_layer) if recipe.registers else None,
        )  # fmt: skip

    def bundle(self) -> Bundle:
        """The present model (averaged weights if there are any) with everything a policy needs."""
        model = copy.deepcopy(self.average if self.average is not None else self.model).eval()
        training = {
            "config": self.config.identity(),
            "step": self.step_number,
            "data_fingerprint": self.data.dataset.fingerprint,
            "torch": torch.__version__,
        }
        if self._before is not None:  # what this run left as it was is told by the runs before it
            training["init"] = self._before
        return Bundle(
            model, self.data.embodiment, self.data.state_normalizer, self.data.action_normalizer, self.tokenizers,
            self.text_tokenizer, (0,), training, data=self.data.content,
        )  # fmt: skip

    def _ask_teachers(self, start: Bundle | None) -> dict[str, FixedPoints]:
        """Of the heads that are distilled; training is cut to the frames that were asked for."""
        out: dict[str, FixedPoints] = {}
        for name, head in self.config.heads.items():
            if head.distill is None or start is None:
                continue
            if name not in self.taken or set(self.tokenizers[name].token_lengths.tolist()) != {1}:
                raise ConfigError(
                    explain(f"train.heads.{name}.distill",
                            f"a head {head.distill.teacher or name!r} of bins in init, of the same shape",
                            ", ".join(f"{h.name} ({h.kind})" for h in start.config.heads), "Train that head first.")
                )  # fmt: skip
            frames = np.unique(self.data.train_frames)
            most = min(head.distill.frames, len(frames))
            frames = np.sort(np.random.default_rng(self.config.seed).choice(frames, most, replace=False))
            self.data.train_frames = frames
            val = self.data.val_frames[: self.config.batch_size * self.config.val_batches]
            self.data.val_frames = val
            out[name] = collect(
                self.model.eval(), name, self._grammar(name), self.data, np.sort(np.concatenate((frames, val))),
                self.out, " ".join((start.fingerprint, head.distill.teacher or name, self.data.dataset.fingerprint)),
                lambda done, total: self._log({"event": "teacher", "done": done, "total": total}),
            )  # fmt: skip
        return out

    # ---- one step ----
    def learning_rate(self, step: int) -> float:
        config = self.config
        if step < self.look_steps:
            return config.look_lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
        step, steps = step - self.look_steps, config.steps - self.look_steps
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        share = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * share)))

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the losses, detached."""
        config = self.config
        looking = self.step_number < self.look_steps
        pool = self.data.first_frames if looking else self.data.train_frames
        frames = sample_frames(config.seed, self.step_number, pool, config.batch_size)
        self.model.train()
        losses = (self._look_loss if looking else self._loss)(self.model, self._tensors(frames, self.step_number))
        objectives.finite(losses["loss"], self.step_number).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step_number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        if self.average is not None:
            decay = min(config.ema, self.step_number / (self.step_number + 10))
            with torch.no_grad():
                averaged = list(self.average.parameters())
                torch._foreach_lerp_(averaged, list(self.model.parameters()), 1 - decay)
        return {**{name: value.detach() for name, value in losses.items()}, "gradient_norm": norm.detach()}

    def _tensors(
        self, frames: np.ndarray, step: int | None, validation: int = 0, model: Vla | None = None
    ) -> dict[str, Any]:
        """The batch of these frames and the random numbers of this step (None: of this validation batch), on the
        device. model: whose iterates are wanted where heads are distilled, None for the one that is trained."""
        batch = self.data.batch(frames)
        seed = [self.config.seed, step, 2] if step is not None else [1234, validation]
        repeats = max(head.noise_repeats for head in self.config.heads.values())
        plain = {**vars(batch), **draw(seed, *batch.chunk.shape, repeats), **self._distillation(batch, frames)}
        given = {
            name: {key: torch.from_numpy(item).to(self.device) for key, item in value.items()}
            if isinstance(value, dict)
            else torch.from_numpy(value).to(self.device)
            for name, value in plain.items()
        }
        if step is not None and self.config.image_shift:
            given["images"] = {name: self._shifted(value, step) for name, value in given["images"].items()}
        if self.taught:
            given["iterate"] = self._iterates(model or self.model, given, [*seed, 3])
        return given

    def _distillation(self, batch: Batch, frames: np.ndarray) -> dict[str, Any]:
        """What branches of distilled heads need, but for the iterate; their labels in `batch` become the mixed ones."""
        out: dict[str, dict[str, np.ndarray]] = {"settled": {}, "anchor": {}, "consistency": {}}
        for name, points in self.taught.items():
            recipe = self.config.heads[name].distill
            assert recipe is not None
            settled = points.take(frames)
            horizon, dims = batch.chunk.shape[1:]
            said = np.stack([self.tokenizers[name].decode(row.tolist(), horizon, dims) for row in settled])
            close = np.abs(said - batch.chunk).mean(axis=(1, 2)) < recipe.tolerance
            batch.tokens[name] = np.where(close[:, None], settled, batch.tokens[name])
            out["settled"][name] = settled
            out["anchor"][name] = np.array(recipe.anchor, np.float32)
            out["consistency"][name] = np.array(recipe.consistency, np.float32)
        return out if self.taught else {}

    def _iterates(self, model: Vla, given: dict[str, Any], seed: list[int]) -> dict[str, Tensor]:
        """Where the distilled heads of `model` stand on their way to the fixed point; not a part of the compiled loss,
        as no gradient goes through it."""
        out = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            for name in self.taught:
                recipe, settled = self.config.heads[name].distill, given["settled"][name]
                assert recipe is not None
                passes, begin = way(seed, recipe.passes, settled.shape[1])
                out[name] = iterate(model, name, self._grammar(name), given, settled, passes, begin)
        return out

    def _grammar(self, head: str) -> Grammar:
        config = self.model.config
        return Grammar(self.tokenizers[head], config.horizon, config.action_dim, self.device)

    def _shifted(self, images: Tensor, step: int) -> Tensor:
        """Random shift by whole pixels, edges repeated (Kostrikov et al. 2020, DrQ); one shift per batch and step."""
        reach = self.config.image_shift
        dy, dx = np.random.default_rng([self.config.seed, step, 1]).integers(-reach, reach + 1, 2)
        rows = (torch.arange(images.shape[1], device=self.device) + int(dy)).clamp(0, images.shape[1] - 1)
        cols = (torch.arange(images.shape[2], device=self.device) + int(dx)).clamp(0, images.shape[2] - 1)
        return images[:, rows][:, :, cols]

    def _losses(self, model: Vla, given: dict[str, Any]) -> dict[str, Tensor]:
        recipe = self.config.model
        trained = [head for head in model.config.heads if head.name in self.config.heads]
        heads = sorted(trained, key=lambda head: head.expert)
        exits = sorted({head.exit_layer for head in heads if head.exit_layer})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
                trunk = model.prefix_segments(given["images"], given["text"], given["text_valid"], given["state"])
            made = [branches(model, head, given, self.config.heads[head.name]) for head in heads]
            segments = [segment for own, _ in made for segment in own]
            flows = [head.name for head in heads if head.kind == "flow"]
            condition = model.heads[flows[0]].condition(given["time"]) if flows else None
            read: dict[str, Tensor] = {}
            if self.config.freeze:  # nothing learns from what is read off the backbone
                depths = model.run_behind(trunk, segments, exits, condition)
            else:
                depths = model.run_with_exits([*trunk, *segments], exits, condition)
                read = {name: head(depths[-1][len(trunk) - 1][:, 0]) for name, head in model.auxiliary.items()}
                depths = [hidden[len(trunk) :] for hidden in depths]
                if model.look is not None:  # as look_ahead does
                    points = next(segment for segment in trunk if segment.kind.startswith("points:"))
                    read["look"] = model.look(points.embeddings[:, 0])
            out: dict[str, Tensor] = {}
            total = torch.zeros((), device=self.device)
            place = 0
            for head, (own, losses_of) in zip(heads, made):
                early = [depths[exits.index(head.exit_layer)]] if head.exit_layer else []
                places = range(place, place + len(own))
                losses = losses_of([[hidden[at] for hidden in (*early, depths[-1])] for at in places])
                place += len(own)
                total = total + self.config.heads[head.name].weight * losses["loss"]
                out |= {head.name if name == "loss" else f"{head.name}_{name}": v for name, v in losses.items()}
        for name, target, weight in (
            ("keyframe", given["keyframe"], recipe.keyframe_weight),
            ("chunk", given["chunk"], recipe.chunk_weight),
            ("look", given["look"], recipe.look_weight),
        ):
            if weight and name in read:
                out[name] = objectives.l1(read[name], target)
                total = total + weight * out[name]
        return {"loss": total, **out}

    def _look_losses(self, model: Vla, given: dict[str, Any]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            read = model.look_ahead(given["images"], given["text"], given["text_valid"])
        loss = objectives.l1(read, given["look"])
        return {"loss": loss, "look": loss}

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights on held-out episodes, the same frames every time."""
        model = (self.average if self.average is not None else self.model).eval()
        sums: dict[str, float] = {}
        frames = self.data.val_frames
        if len(frames) == 0:
            return {}
        batches = min(self.config.val_batches, max(1, len(frames) // self.config.batch_size))
        for i in range(batches):
            chosen = sample_frames(1234, i, frames, min(self.config.batch_size, len(frames)))
            for name, value in self._losses(model, self._tensors(chosen, None, i, model)).items():
                sums[name] = sums.get(name, 0.0) + float(value) / batches
        return {f"val_{name}": value for name, value in sums.items()}

    # ---- checkpoints ----
    @property
    def checkpoint_path(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Everything a resume needs, written atomically."""
        state = {
            "identity": json.dumps(self.config.identity(), sort_keys=True),
            "step": self.step_number,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.checkpoint_path) as temporary:
            torch.save(state, temporary)

    def resume(self) -> bool:
        """Continue from the checkpoint of this run, if there is one of the same configuration."""
        if not self.checkpoint_path.exists():
            return False
        try:
            state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise DataError(
                explain(str(self.checkpoint_path), "a checkpoint", f"unreadable ({error})", "Remove it to start anew.")
            ) from error
        changed = self.config.changed(json.loads(state["identity"]))
        if changed:
            raise ConfigError(
                explain(str(self.out), f"the same {', '.join(changed)} as before", "other values",
                        "Choose another out, or remove its checkpoint.pt.")
            )  # fmt: skip
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]
        return True

    # ---- the run ----
    def run(self) -> TrainReport:
        config = self.config
        resumed = self.resume()
        self._log({
            "event": "start", "resumed": resumed, "step": self.step_number, "steps": config.steps,
            "parameters": sum(p.numel() for p in self.model.parameters()), "frames": len(self.data.train_frames),
            "validation_frames": len(self.data.val_frames), "cameras": {c.name: c.size for c in self.cameras},
            "tokens": {name: {"mean": mean, "max": most} for name, (mean, most) in self.data.token_counts.items()},
            "device": str(self.device),
        })  # fmt: skip
        last = min(config.steps, config.stop_step or config.steps)
        losses: dict[str, float] = {}
        validation: dict[str, float] = {}
        samples_per_s = 0.0
        with _scalars(self.out / "tensorboard", self.step_number) as scalar:
            since, at = time.perf_counter(), self.step_number
            try:
                while self.step_number < last:
                    current = self.step()
                    if self.step_number % config.log_every == 0 or self.step_number == last:
                        now = time.perf_counter()
                        samples_per_s = (self.step_number - at) * config.batch_size / (now - since)
                        since, at = now, self.step_number
                        losses = {name: float(value) for name, value in current.items()}
                        row = {**losses, "lr": self.learning_rate(self.step_number), "samples_per_s": samples_per_s}
                        scalar(row, self.step_number)
                        self._log({"event": "step", "step": self.step_number, **row})
                    if self.step_number % config.val_every == 0 or self.step_number == last:
                        validation = self.validate()
                        scalar(validation, self.step_number)
                        self._log({"event": "validation", "step": self.step_number, **validation})
                        since, at = time.perf_counter(), self.step_number
                    if self.step_number % config.checkpoint_every == 0:
                        self.save()
                        bundles.save(self.bundle(), self.out / "bundle")
                    if self._rollout and config.rollout_every and self.step_number % config.rollout_every == 0:
                        result = self._rollout(self.bundle(), self.step_number)
                        scalar({f"rollout_{name}": value for name, value in result.items()}, self.step_number)
                        self._log({"event": "rollout", "step": self.step_number, **result})
                        since, at = time.perf_counter(), self.step_number
            except KeyboardInterrupt:
                self.save()
                self._log({"event": "interrupted", "step": self.step_number})
                raise
        self.save()
        bundles.save(self.bundle(), self.out / "bundle")
        return TrainReport(
            self.step_number, losses.get("loss", math.nan), validation.get("val_loss", math.nan), samples_per_s,
            str(self.out / "bundle"),
        )  # fmt: skip


@contextlib.contextmanager
def _scalars(folder: Path, step: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    """TensorBoard scalars, and the same rows as JSON lines beside it."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step) as writer, (folder.parent / "curve.jsonl").open("a") as stream:

        def write(values: dict[str, float], at: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, at)
            stream.write(json.dumps({"step": at, **values}) + "\n")
            stream.flush()

        yield write


def train(config: TrainConfig, log: Log | None = None, rollout: Rollout | None = None) -> TrainReport:
    """Train to the end, resuming a run that was killed."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with exclusive(config.out, "out"):
        return Trainer(config, log, rollout).run()
