"""Windows over episodes: rows at offsets into the past and the future of a frame. numpy only.

    windows = Windows(dataset, embodiment)
    rows, valid = windows.rows(frames, offsets=(-4, 0))        # past frames, for history
    actions, valid = windows.actions(frames, horizon=20)       # the chunk that training predicts

A window never leaves its episode. Before the beginning the first row stands, as it does at execution, where the history
of a new episode is its first frame. After the end the action is "stay": see `Windows.actions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.data.lerobot import LeRobotDataset
from vla.embodiment import Embodiment
from vla.errors import DataError, explain


class Windows:
    """Index arithmetic of one data set, and its actions. Frames are row numbers of the data set."""

    def __init__(self, dataset: LeRobotDataset, embodiment: Embodiment, action_key: str = "action"):
        starts = np.array([episode.start for episode in dataset.episodes])
        stops = np.array([episode.stop for episode in dataset.episodes])
        owner = dataset.episode_of
        self._first, self._last = starts[owner], stops[owner] - 1  # [N]
        self._actions = np.asarray(dataset.column(action_key), np.float32)
        if self._actions.ndim != 2 or self._actions.shape[1] != embodiment.action_dim:
            raise DataError(
                explain(
                    f"{dataset.path}: {action_key}",
                    f"float32[N, {embodiment.action_dim}] for {embodiment.name}",
                    f"shape {self._actions.shape}",
                    "Use the embodiment that the data was collected with.",
                )
            )
        self._stay = _stay_mask(embodiment)
        pushed = np.asarray(dataset.column("perturbed"), bool) if "perturbed" in dataset.features else None
        self._perturbed = pushed if pushed is not None else np.zeros(len(self._actions), bool)

    def __len__(self) -> int:
        return len(self._actions)

    def rows(self, frames: np.ndarray, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """frames: int[B] -> rows int64[B, len(offsets)] inside the episode, and whether each is the one asked for."""
        wanted = np.asarray(frames)[:, None] + np.asarray(offsets, np.int64)[None]
        inside = np.clip(wanted, self._first[frames][:, None], self._last[frames][:, None])
        return inside, inside == wanted

    def actions(self, frames: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """frames: int[B] -> actions float32[B, T, A] from each frame on, and valid bool[B, T].

        After the end of the episode the arm stays: dimensions that are deltas become 0, the gripper and absolute joint
        positions repeat their last value, and `valid` is False. A loss may use these entries (they teach to stop) or
        leave them out.
        """
        rows, valid = self.rows(frames, range(horizon))
        chunk = self._actions[rows]
        return np.where(valid[..., None] | self._stay, chunk, np.float32(0.0)), valid

    def undisturbed(self, frames: np.ndarray, horizon: int) -> np.ndarray:
        """bool[B, T]: False for actions that answer a perturbation which the observation at the frame cannot know of.

        The expert's label at a step is right for the state it saw. Once something else was executed at step k, the
        actions after k in the same chunk correct a push that came later than the observation.
        """
        rows, _ = self.rows(frames, range(horizon))
        pushed = np.cumsum(self._perturbed[rows], axis=1)
        return np.concatenate([np.ones((len(rows), 1), bool), pushed[:, :-1] == 0], axis=1)


def _stay_mask(embodiment: Embodiment) -> np.ndarray:
    """bool[A]: dimensions that keep their last value when the arm is to stay; the others are deltas and become 0."""
    if embodiment.action_space == "joint_position":
        return np.ones(embodiment.action_dim, bool)
    return np.array([name == "gripper" for name in embodiment.action_names])
