"""A bundle and a decoder as a Policy."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla.checkpoints import bundle as bundles
from vla.checkpoints.bundle import Bundle
from vla.data.transforms import fits, fitted, resize
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import DecodeInput, Decoder, Grammar
from vla.embodiment import Embodiment
from vla.errors import BundleError, ConfigError, ObservationError, explain
from vla.models.pruning import TokenSelection
from vla.policy import DecodeReport, InferContext, InferResult
from vla.types import ActionChunk, Observation


class VlaPolicy:
    """Observations -> normalised tensors -> prefix -> decoder -> normalised actions -> chunk in physical units.

    Deterministic for equal observations, contexts and seeds; keeps no state between calls. selection: which visual
    tokens to keep (see vla.models.pruning), None for all; reports then name them.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder | None = None, selection: TokenSelection | None = None):
        if tuple(bundle.observation_offsets) != (0,):
            raise BundleError(
                explain("observation_offsets", "[0]", list(bundle.observation_offsets), "No history is kept yet.")
            )
        self.bundle = bundle
        self.decoder = decoder or AutoregressiveDecoder()
        self.decoder.check(bundle)
        self.selection = selection
        if selection is not None:
            selection.check(bundle.config)
        self.device = next(bundle.model.parameters()).device
        self._grammars: dict[str, Grammar] = {}
        self._costs: dict[str, dict[int, float]] = {}
        self._seed = 0

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        decoder: Decoder | None = None,
        device: str = "cpu",
        threads: int | None = None,
        selection: TokenSelection | None = None,
    ) -> VlaPolicy:
        """Load a bundle folder. device: see `device_named`. threads: torch CPU threads of this process (None leaves
        them as they are)."""
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(bundles.load(path, str(device_named(device))), decoder, selection)

    @property
    def embodiment(self) -> Embodiment:
        return self.bundle.embodiment

    @property
    def horizon(self) -> int:
        return self.bundle.config.horizon

    def reset(self, seed: int) -> None:
        self._seed = seed

    def warm_up(self) -> None:
        """Run once on a blank observation, so that the first real inference is not slower than the others."""
        images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in self.embodiment.cameras}
        state = self.bundle.state_normalizer.center.astype(np.float32)
        self.infer_batch([Observation(images, state, "warm up", 0)], [InferContext()])

    @torch.inference_mode()
    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        """One InferResult per observation; ObservationError names what does not fit the bundle."""
        started = time.perf_counter()
        config, bundle = self.bundle.config, self.bundle
        state = np.stack([self._state(observation) for observation in observations])
        images = {
            camera.name: torch.from_numpy(
                np.stack([self._image(observation, camera.name, camera.size) for observation in observations])
            ).to(self.device)
            for camera in config.cameras
        }
        ids, valid = bundle.text_tokenizer.encode_padded([observation.instruction for observation in observations])
        seeds = [_mix(self._seed if c.episode_seed is None else c.episode_seed, c.seed) for c in contexts]
        prepared = time.perf_counter()
        segments = bundle.model.prefix_segments(
            images,
            torch.from_numpy(ids).to(self.device),
            torch.from_numpy(valid).to(self.device),
            torch.from_numpy(state).to(self.device),
        )
        prefix = bundle.model.prefix(segments, config.suffix_room, self.selection)
        encoded = time.perf_counter()
        decoded = self.decoder.decode(DecodeInput(bundle, prefix, seeds, contexts, self.grammar, started, self._costs))
        kept = None if prefix.kept is None else prefix.kept.cpu().numpy()
        results = []
        period_s = self.embodiment.period_s
        for sample, (observation, context) in enumerate(zip(observations, contexts)):
            chunk = ActionChunk(
                bundle.action_normalizer.unnormalize(decoded.actions[sample]),
                context.start_ns or observation.stamp_ns,
                period_s,
            )
            done = time.perf_counter()
            times = {
                "preprocess": (prepared - started) * 1e3,
                "prefix": (encoded - prepared) * 1e3,
                "decode": (done - encoded) * 1e3,
                "total": (done - started) * 1e3,
            }
            ids, repaired, confidence, notes = decoded.at(sample)
            visual = None if kept is None else kept[sample]
            report = DecodeReport(ids, decoded.passes, repaired, confidence, visual, times, notes)
            results.append(InferResult(chunk, report))
        return results

    def grammar(self, head: str) -> Grammar:
        """The grammar of one head's tokens, made once."""
        if head not in self._grammars:
            tokenizer, config = self.bundle.action_tokenizers[head], self.bundle.config
            self._grammars[head] = Grammar(tokenizer, config.horizon, config.action_dim, self.device)
        return self._grammars[head]

    # ---- one observation ----
    def _state(self, observation: Observation) -> np.ndarray:
        observation.check()
        expected = (self.embodiment.state_dim,)
        if np.shape(observation.state) != expected:
            raise ObservationError(
                explain(
                    "state",
                    f"float32{list(expected)}: {', '.join(self.embodiment.state_names)}",
                    f"shape {list(np.shape(observation.state))}",
                    "Build it in the bundle's order of state_names.",
                )
            )
        return self.bundle.state_normalizer.normalize(np.asarray(observation.state))

    def _image(self, observation: Observation, camera: str, size: int) -> np.ndarray:
        if camera not in observation.images:
            raise ObservationError(
                explain(f"camera {camera!r}", "an image", f"cameras {sorted(observation.images)}", "Connect it.")
            )
        image = observation.images[camera]
        wanted = self.embodiment.camera(camera)
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not fits(*image.shape[:2], wanted):
            raise ObservationError(
                explain(
                    f"camera {camera!r}",
                    f"uint8[{wanted.height}, {wanted.width}, 3], or larger in that proportion",
                    f"{image.dtype}{list(image.shape)}",
                    "Publish the camera at the size the bundle was trained with.",
                )
            )
        return resize(fitted(image, wanted), size, size)


def device_named(name: str) -> torch.device:
    """cpu, cuda or cuda:N; auto is the GPU where there is one. ConfigError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise ValueError("an unknown name")
        return torch.empty(0, device=name).device
    except (ValueError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        got = f"{name!r}: {str(error).splitlines()[0].rstrip('.')}"
        raise ConfigError(
            explain("device", "auto, cpu, or cuda or cuda:N that is there", got, "See `vla doctor`; cpu always works.")
        ) from error


def _mix(a: int, b: int) -> int:
    """Two seeds into one, stable across processes."""
    mixed = np.random.SeedSequence([a & (2**63 - 1), b & (2**63 - 1)]).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1  # numpy 1 cannot shift its own number by a Python one
