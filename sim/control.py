"""Scripted experts by name, and as policies: what collection, evaluation and the simulator node share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sim.environment import Environment
from vla.embodiment import Embodiment
from vla.errors import ConfigError, nearest
from vla.policy import InferContext, InferResult
from vla.types import ActionChunk, Observation


class Expert(Protocol):
    """A script that reads simulator state, which no policy can."""

    def reset(self) -> None:
        """Plan anew for the scene as it stands, right after the environment was reset."""
        ...

    def action(self) -> np.ndarray:
        """float32[A] in physical units: what it does now, whatever was executed before."""
        ...


# environment -> "module:constructor"; the constructor takes the environment
EXPERTS = {
    "tabletop": "sim.tabletop.expert:Expert",
    "libero_spatial": "sim.libero.expert:LiberoExpert",
    "libero_object": "sim.libero.expert:LiberoExpert",
    "libero_goal": "sim.libero.expert:LiberoExpert",
    "libero_10": "sim.libero.expert:LiberoExpert",
}


def make_expert(name: str, environment: Environment, **options: Any) -> Expert:
    """The scripted expert of an environment, with its own options; ConfigError when it has none."""
    if name not in EXPERTS:
        raise ConfigError(f"expert: none for environment {name!r}. {nearest(name, EXPERTS)}")
    module, _, attribute = EXPERTS[name].partition(":")
    expert: Expert = getattr(importlib.import_module(module), attribute)(environment, **options)
    return expert


class ExpertPolicy:
    """A scripted expert behind the Policy protocol, one action per chunk. It looks at the simulator, not at images."""

    def __init__(self, expert: Expert, embodiment: Embodiment):
        self.embodiment, self.horizon = embodiment, 1
        self._expert = expert

    def reset(self, seed: int) -> None:
        self._expert.reset()

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        action = np.asarray(self._expert.action(), np.float32)[None]
        return [InferResult(ActionChunk(action, c.start_ns, self.embodiment.period_s)) for c in contexts]
