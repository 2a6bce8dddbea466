"""What the tests of this folder share: a small robot, policies that show what they were given, servers."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from policies.hold import HoldPolicy
from policies.remote import protocol
from policies.remote.client import RemotePolicy
from policies.remote.server import Limits, PolicyServer
from vla.embodiment import Embodiment
from vla.errors import ObservationError
from vla.policy import InferContext, InferResult, Policy
from vla.resources import load_embodiment
from vla.types import ActionChunk, Observation

ROBOT = load_embodiment("tabletop")
HELLO = protocol.Hello(ROBOT, 8)


def observation(seed: int = 0, robot: Embodiment = ROBOT, **changes: Any) -> Observation:
    rng = np.random.default_rng(seed)
    images = {c.name: rng.integers(0, 255, (c.height, c.width, 3), dtype=np.uint8) for c in robot.cameras}
    state = rng.normal(scale=0.1, size=robot.state_dim).astype(np.float32)
    given = {"images": images, "state": state, "instruction": "push", "stamp_ns": 1_000 + seed}
    return Observation(**{**given, **changes})


def context(seed: int = 0, robot: Embodiment = ROBOT, **changes: Any) -> InferContext:
    """Every field set."""
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(4, robot.action_dim)).astype(np.float32)
    given = {
        "previous": ActionChunk(actions, 900, 0.05), "executed": 2,
        "committed": actions[2:3], "start_ns": 2_000, "seed": seed, "episode_seed": 10 + seed,
    }  # fmt: skip
    return InferContext(**{**given, **changes})


class Echo(HoldPolicy):
    """Every action is the mean of the first image of its own observation; remembers the sizes of its batches and what
    it was given. state[0] > 5 breaks the batch it is in."""

    def __init__(self, robot: Embodiment = ROBOT, delay_s: float = 0.0):
        super().__init__(robot)
        self.delay_s = delay_s
        self.batches: list[int] = []
        self.given: list[tuple[Observation, InferContext]] = []

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        self.batches.append(len(observations))
        self.given += zip(observations, contexts)
        time.sleep(self.delay_s)
        if any(o.state[0] > 5 for o in observations):
            raise RuntimeError("this one breaks me")
        if any(o.state[0] < -5 for o in observations):
            raise ObservationError("state: expected more, got less. Lift it.")
        return [InferResult(ActionChunk(self._actions(o), c.start_ns, 0.05)) for o, c in zip(observations, contexts)]

    def _actions(self, observation: Observation) -> np.ndarray:
        value = observation.images[self.embodiment.camera_names[0]].mean(dtype=np.float64)
        return np.full((self.horizon, self.embodiment.action_dim), value, np.float32)


QUICK = Limits(handshake_s=1.0, ping_s=0.3, pong_s=0.5, close_s=0.3)


@contextlib.contextmanager
def served(policy: Policy, limits: Limits = QUICK, **options: Any) -> Iterator[RemotePolicy]:
    """A client of a server of `policy`, in this process."""
    server = PolicyServer(policy, port=0, limits=limits, **options)
    with server.running() as address, RemotePolicy(address, token=options.get("token", "")) as remote:
        yield remote


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def opened(address: str, head: bytes = b"") -> socket.socket:
    """A raw connection that has said `head`."""
    sock = socket.create_connection(("127.0.0.1", port_of(address)), timeout=10)
    sock.sendall(head)
    return sock


def upgrade(address: str, *more: str) -> bytes:
    """The opening handshake of a websocket client."""
    lines = [
        "GET / HTTP/1.1", f"Host: 127.0.0.1:{port_of(address)}", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *more,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()
