"""What a policy around another one remembers of every robot it serves. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from vla.policy import InferContext, Policy, PolicyWrapper
from vla.types import Observation


@dataclass
class RobotMemory:
    """actions: of the chunk that the robot was given last. instruction: what it was told then."""

    actions: np.ndarray
    instruction: str


M = TypeVar("M", bound=RobotMemory)


class RememberingPolicy(PolicyWrapper, Generic[M]):
    """There is one memory per place in a batch. It counts only for the robot whose running chunk came from it: with
    another chunk in the context, another instruction or none it is forgotten."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self._robots: dict[int, M] = {}

    def reset(self, seed: int) -> None:
        self._robots.clear()
        super().reset(seed)

    def remembered(self, place: int, observation: Observation, context: InferContext) -> M | None:
        """The memory of the robot that asks at this place of the batch."""
        robot, previous = self._robots.get(place), context.previous
        if (
            robot is not None
            and previous is not None
            and observation.instruction == robot.instruction
            and np.array_equal(previous.actions, robot.actions)
        ):
            return robot
        self._robots.pop(place, None)
        return None
