"""Policies without weights: one that holds still, one that plays given chunks. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain
from vla.policy import InferContext, InferResult
from vla.types import ActionChunk, Observation


class HoldPolicy:
    """Zero motion; the gripper stays as it is. The baseline that must score 0 %, and a safe stand-in for a policy.

    For joint_position actions the state must hold a position for each: of its name, or of the joint in its place (the
    Panda's action `gripper` moves panda_finger_joint1). For deltas zero is "no change"; the gripper entry of `ee_delta`
    is a goal, not a change: it repeats `gripper` (default: open).
    """

    def __init__(self, embodiment: Embodiment, horizon: int = 8, gripper: float | None = None) -> None:
        self._held: list[int] = []  # of each action, its place in the state
        if embodiment.action_space == "joint_position":
            names, known = list(embodiment.action_names), embodiment.state_names
            for place, joint in enumerate(embodiment.joints[: len(names)]):
                names[place] = names[place] if names[place] in known else joint.name
            if missing := [name for name in names if name not in known]:
                remedy = "Holding needs the positions: name the joints among state_names."
                raise ConfigError(explain("state_names", "the position of every action", f"without {missing}", remedy))
            self._held = [known.index(name) for name in names]
        self._embodiment, self._horizon = embodiment, horizon
        self._action = np.zeros(embodiment.action_dim, np.float32)
        if embodiment.action_space == "ee_delta" and "gripper" in embodiment.action_names:
            value = float(embodiment.gripper_open) if gripper is None else gripper
            self._action[embodiment.action_names.index("gripper")] = value

    @property
    def embodiment(self) -> Embodiment:
        return self._embodiment

    @property
    def horizon(self) -> int:
        return self._horizon

    def reset(self, seed: int) -> None:
        pass

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        return [self._hold(observation, context) for observation, context in zip(observations, contexts)]

    def _hold(self, observation: Observation, context: InferContext) -> InferResult:
        action = self._action
        if self._embodiment.action_space == "joint_position":
            action = np.asarray(observation.state, np.float32)[self._held]
        actions = np.tile(action, (self._horizon, 1))
        return InferResult(ActionChunk(actions, context.start_ns, self._embodiment.period_s))


class ScriptedPolicy:
    """Plays given chunks in order, float32[T, A] each, and the last one again and again."""

    def __init__(self, embodiment: Embodiment, chunks: Sequence[np.ndarray]) -> None:
        if not chunks or len({chunk.shape for chunk in chunks}) != 1 or chunks[0].shape[1:] != (embodiment.action_dim,):
            got = [chunk.shape for chunk in chunks]
            raise ConfigError(
                explain("chunks", f"equal shapes [T, {embodiment.action_dim}]", got, "Give one row per action.")
            )
        self._embodiment = embodiment
        self._chunks = [np.asarray(chunk, np.float32) for chunk in chunks]
        self._next = 0

    @property
    def embodiment(self) -> Embodiment:
        return self._embodiment

    @property
    def horizon(self) -> int:
        return len(self._chunks[0])

    def reset(self, seed: int) -> None:
        self._next = 0

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        return [self._play(context) for context in contexts]

    def _play(self, context: InferContext) -> InferResult:
        actions = self._chunks[min(self._next, len(self._chunks) - 1)]
        self._next += 1
        return InferResult(ActionChunk(actions.copy(), context.start_ns, self._embodiment.period_s))
