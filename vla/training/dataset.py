"""Training samples from a LeRobotDataset: everything small is prepared once, images come from a memory map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla.data.content import DataContent, content_of
from vla.data.frames import FrameStore
from vla.data.lerobot import LeRobotDataset
from vla.data.normalize import Normalizer
from vla.data.window import Windows
from vla.embodiment import Embodiment
from vla.errors import DataError, explain
from vla.tokenizers import ActionTokenizer
from vla.tokenizers.text import TextTokenizer

IGNORE = -100  # label of positions without a loss
_LOOK_MIN_STD = 0.3  # of a normalised state value at those changes; less cannot be told from a picture
_POSITIONS = ("ee_x", "ee_y", "ee_z")
LOOKS = 2  # gripper changes of an episode that Batch.look holds: where to grasp, where to let go


@dataclass(frozen=True)
class Batch:
    """One training batch, numpy, normalised.

    images: {camera: uint8[B, H, W, 3]}. text, text_valid: [B, L]. state: float32[B, S]. tokens: {head: int64[B, K]},
    IGNORE behind the end. chunk: float32[B, T, A]. keyframe: float32[B, S], the state at the next gripper change.
    look: float32[B, LOOKS, S], the states at the episode's first gripper changes, standardised; NaN for those that are
    over, for values that hardly differ from episode to episode, and for all but the tool's position where the state has
    one. It is where the words alone send the arm.
    """

    images: dict[str, np.ndarray]
    text: np.ndarray
    text_valid: np.ndarray
    state: np.ndarray
    tokens: dict[str, np.ndarray]
    chunk: np.ndarray
    keyframe: np.ndarray
    look: np.ndarray


class TrainingData:
    """Index arithmetic and prepared arrays of one data set.

    Episodes are split into training and validation by their number (every `1 / val_fraction`-th one validates, of
    fewer the last), so the split does not depend on the seed of training. Frames whose next `settle` actions answer a
    perturbation that the observation cannot know of are left out of training. The first `early_steps` frames of an
    episode count `early_repeat` times; of the later ones every `late_stride`-th is used (neighbours say nearly the
    same, and what is not used takes no memory).
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        horizon: int,
        val_fraction: float = 0.03,
        settle: int = 8,
        early_steps: int = 0,
        early_repeat: int = 1,
        late_stride: int = 1,
    ):
        self.dataset, self.horizon = dataset, horizon
        self.embodiment: Embodiment = dataset.embodiment()
        self.windows = Windows(dataset, self.embodiment)
        self.use_normalizers(
            Normalizer.from_stats(dataset.stats["observation.state"]), Normalizer.from_stats(dataset.stats["action"])
        )
        every, count = max(2, round(1 / val_fraction)), len(dataset.episodes)
        every = min(every, count) if count > 2 else every  # of a handful, the last
        frames = np.arange(len(dataset))
        validates = np.asarray(dataset.episode_of) % every == every - 1
        clean = self.windows.undisturbed(frames, min(settle, horizon)).all(axis=1)
        # Only in the first steps of an episode the words alone say where to go; later the motion gives it away.
        since_start = frames - np.array([episode.start for episode in dataset.episodes])[dataset.episode_of]
        clean &= (since_start < early_steps) | ((since_start - early_steps) % late_stride == 0)
        self.train_frames, self.val_frames = frames[~validates & clean], frames[validates & clean]
        self._rows = frames[clean]
        self.first_frames = self.train_frames[since_start[self.train_frames] == 0]
        repeats = np.where(since_start[self.train_frames] < early_steps, early_repeat, 1)
        self.train_frames = np.repeat(self.train_frames, repeats)
        if len(self.train_frames) == 0:
            raise DataError(explain(str(dataset.path), "training frames", "none", "Collect more episodes."))
        self.task_of = np.asarray(dataset.column("task_index"), np.int64).reshape(-1)
        self._keyframe_rows = self._next_keyframe()
        starts = np.array([episode.start for episode in dataset.episodes])
        ends = np.array([episode.stop for episode in dataset.episodes])
        looks = [self._keyframe_rows[starts]]
        while len(looks) < LOOKS:
            looks.append(self._keyframe_rows[np.minimum(looks[-1] + 1, ends - 1)])
        self._first_keyframes = np.stack(looks, axis=1)
        targets = self.states[self._first_keyframes]
        std = targets.std(axis=(0, 1))
        std[std < _LOOK_MIN_STD] = np.nan
        names = self.embodiment.state_names
        if any(name in _POSITIONS for name in names):  # small turns of the wrist would drown them
            std[[name not in _POSITIONS for name in names]] = np.nan
        self._look_targets = (targets - targets.mean(axis=(0, 1))) / std

    def use_normalizers(self, state: Normalizer, action: Normalizer) -> None:
        """Normalise with these: by default the data set's own statistics, else those of the bundle to start from."""
        self.state_normalizer, self.action_normalizer = state, action
        self.states = state.normalize(np.asarray(self.dataset.column("observation.state"), np.float32))

    def chunks(self, frames: np.ndarray) -> np.ndarray:
        """Normalised action chunks float32[B, T, A]; behind the end of an episode the arm stays."""
        return self.action_normalizer.normalize(self.windows.actions(frames, self.horizon)[0])

    def prepare(
        self,
        tokenizers: Mapping[str, ActionTokenizer],
        text_tokenizer: TextTokenizer,
        image_sizes: dict[str, tuple[int, int]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Tokenize every chunk once, for every head that makes tokens, and open the frame store."""
        self._tokens, self.token_counts = {}, {}
        for head, tokenizer in tokenizers.items():
            lists: list[list[int]] = []
            for start in range(0, len(self._rows), 4096):
                lists += [tokenizer.encode(chunk) for chunk in self.chunks(self._rows[start : start + 4096])]
            counts = [len(ids) for ids in lists]
            table = np.full((len(lists), max(counts)), IGNORE, np.int16 if tokenizer.vocab_size < 2**15 else np.int32)
            for row, ids in zip(table, lists):
                row[: len(ids)] = ids
            self._tokens[head], self.token_counts[head] = table, (float(np.mean(counts)), max(counts))
        self._text, self._text_valid = text_tokenizer.encode_padded(list(self.dataset.tasks))
        self.images = FrameStore(self.dataset, image_sizes, on_progress=on_progress, rows=self._rows)

    def batch(self, frames: np.ndarray) -> Batch:
        """frames: int[B]."""
        order = np.asarray(frames)
        used = np.searchsorted(self._rows, order)
        task = self.task_of[order]
        return Batch(
            {camera: self.images.take(camera, order) for camera in self.images},
            self._text[task],
            self._text_valid[task],
            self.states[order],
            {head: table[used].astype(np.int64) for head, table in self._tokens.items()},
            self.chunks(order),
            self.states[self._keyframe_rows[order]],
            self._looks(order),
        )

    @cached_property
    def content(self) -> DataContent:
        """What pictures and states of this data set look like; after `prepare`."""
        names = self.embodiment.state_names
        return content_of(self.dataset, tuple(self.images), names, np.unique(self.train_frames), self.images.take)

    def _looks(self, frames: np.ndarray) -> np.ndarray:
        episodes = np.asarray(self.dataset.episode_of)[frames]
        ahead = self._first_keyframes[episodes] >= frames[:, None]
        return np.where(ahead[..., None], self._look_targets[episodes], np.float32(np.nan))

    def _next_keyframe(self) -> np.ndarray:
        """int64[N]: the row where a gripper next changes its command, or the last row of the episode."""
        rows = np.empty(len(self.dataset), np.int64)
        sides = self.embodiment.gripper_sides(np.asarray(self.dataset.column("action"), np.float32))
        for episode in self.dataset.episodes:
            span = np.arange(episode.start, episode.stop)
            ends = np.zeros(len(span), bool)
            ends[-1] = True
            ends[:-1] |= (sides[span[1:]] != sides[span[:-1]]).any(axis=1)
            stops = span[ends]
            rows[span] = stops[np.searchsorted(stops, span)]
        return rows


def sample_frames(seed: int, step: int, frames: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    """The frames of one training step: a function of (seed, step) alone, which is what makes a resume exact.

    Epochs are shuffled passes over all frames; the last incomplete batch of an epoch is dropped.
    """
    frames = np.asarray(frames)
    per_epoch = max(1, len(frames) // batch_size)
    epoch, offset = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(frames))
    chosen = order[offset * batch_size : (offset + 1) * batch_size]
    return frames[chosen]
