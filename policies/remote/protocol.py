"""What a policy server and its clients say to each other. numpy and msgpack only.

A websocket carries one message per frame, msgpack with arrays (see packing.py), laid out as openpi's are: a client of
openpi is a client of ours (github.com/Physical-Intelligence/openpi, packages/openpi-client).

    server    hello: what it is, whose robot, which keys it wants     once, when a client connects
    client    an observation                                          one at a time
    server    its actions, or a text frame with what was wrong        the connection lives on after a text

Observation, the keys of REQUIRED and, where a client wants more than a first chunk from a fixed seed, of OPTIONAL:

    observation/images/CAMERA   uint8[H, W, 3], RGB, row 0 at the top, at the camera's size in the hello's embodiment or
                                larger in the same proportion
    observation/state           float[S], in the order of the embodiment's state_names
    prompt                      text

Answer: actions float32[T, A] in physical units, start_ns, period_s, report (DecodeReport as plain data) and
server_timing {wait_ms, infer_ms, batch, prev_total_ms}. Only `actions` is an array: openpi's ActionChunkBroker takes
every array of an answer for one row per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vla import errors
from vla.embodiment import Embodiment
from vla.errors import ObservationError, TransportError, VlaError, explain, nearest
from vla.policy import DecodeReport, InferContext, InferResult
from vla.types import ActionChunk, Observation

PROTOCOL = "vla-remote"
VERSION = 1
DEFAULT_PORT = 8000
IMAGES, STATE, PROMPT = "observation/images/", "observation/state", "prompt"
OPTIONAL = {
    "seed": "int, of this inference (default 0)",
    "episode_seed": "int, what reset() was given (default: the server's)",
    "stamp_ns": "int, when the sensors were read (default 0)",
    "start_ns": "int, due time of the first action (default: stamp_ns)",
    "executed": "int, how many actions of `previous` were executed",
    "committed": "float32[C, A], actions that will be executed while this inference runs",
    "previous": "{actions: float32[T, A], start_ns: int, period_s: float}, the running chunk",
}
_PREVIOUS = {"actions", "start_ns", "period_s"}
_MAX_EXECUTED = 1_000_000


@dataclass(frozen=True)
class Hello:
    """The first message of a server.

    embodiment, horizon: of the policy. policy: its name. fingerprint: hash of its bundle, "" without one. parts: what
    the bundle is run with, {"decoder": its config as plain data, ...}, {} without one. limits: {max_message_bytes,
    max_batch, batch_wait_ms}. software: the server's.
    """

    embodiment: Embodiment
    horizon: int
    policy: str = ""
    fingerprint: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    software: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the layout of observations is in it for who reads it without this file."""
        robot = self.embodiment
        wanted = {
            **{f"{IMAGES}{c.name}": f"uint8[{c.height}, {c.width}, 3] RGB, or larger alike" for c in robot.cameras},
            STATE: f"float32[{robot.state_dim}]: {', '.join(robot.state_names)}",
            PROMPT: "text",
        }
        own = {name: getattr(self, name) for name in ("horizon", "policy", "fingerprint", "software")}
        return {
            "protocol": PROTOCOL, "version": VERSION, "embodiment": robot.to_dict(), **own,
            "parts": dict(self.parts), "limits": dict(self.limits),
            "observation": wanted, "optional": dict(OPTIONAL),
        }  # fmt: skip

    @classmethod
    def read(cls, message: Any, address: str) -> Hello:
        """TransportError for another protocol or version, ConfigError for an embodiment that is none."""
        given = message if isinstance(message, dict) else {}
        got = given.get("protocol"), given.get("version")
        if got != (PROTOCOL, VERSION):
            remedy = "Run the same version of vla-stack on both machines."
            raise TransportError(explain(address, f"{PROTOCOL} version {VERSION}", _words(*got), remedy))
        try:
            return cls(
                Embodiment.from_dict(given["embodiment"]), int(given["horizon"]), str(given["policy"]),
                str(given["fingerprint"]), dict(given["parts"]), dict(given["limits"]), str(given["software"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise TransportError(explain(address, "a complete hello", what, "Is this a vla-stack server?")) from error


# ---- observations ----
def write_request(observation: Observation, context: InferContext, episode_seed: int | None = None) -> dict[str, Any]:
    """An observation with its context as a message. Images that the mapping holds beside the robot's are the caller's
    to leave out. Raises ObservationError for older frames: they have no place in this version."""
    if observation.history:
        got = f"{len(observation.history)} older frames"
        raise ObservationError(explain("history", "none", got, "Run the policy in process."))
    message: dict[str, Any] = {f"{IMAGES}{name}": np.asarray(image) for name, image in observation.images.items()}
    message |= {
        STATE: np.asarray(observation.state, np.float32), PROMPT: observation.instruction,
        "stamp_ns": int(observation.stamp_ns), "start_ns": int(context.start_ns), "seed": int(context.seed),
        "executed": int(context.executed),
    }  # fmt: skip
    seed = context.episode_seed if context.episode_seed is not None else episode_seed
    if seed is not None:
        message["episode_seed"] = int(seed)
    if context.committed is not None:
        message["committed"] = np.asarray(context.committed, np.float32)
    if context.previous is not None:
        previous = context.previous
        message["previous"] = {
            "actions": np.asarray(previous.actions, np.float32), "start_ns": int(previous.start_ns),
            "period_s": float(previous.period_s), "ids": [],  # which servers of the first release expect
        }  # fmt: skip
    return message


def read_request(message: Any, robot: Embodiment) -> tuple[Observation, InferContext]:
    """Undo `write_request`. ObservationError names the key that does not fit; what a policy checks itself (size of
    images and state, words) is left to it."""
    if not isinstance(message, dict):
        raise ObservationError(explain("observation", "a map", type(message).__name__, "Send a dict."))
    images = {key[len(IMAGES) :]: value for key, value in message.items() if key.startswith(IMAGES)}
    known = [*(IMAGES + name for name in robot.camera_names), STATE, PROMPT, *OPTIONAL]
    for key in message:
        if key not in known:
            raise ObservationError(f"observation: unknown key {key[:80]!r}. {nearest(key[:80], known)}")
    for name, image in images.items():
        _array(f"{IMAGES}{name}", image, (None, None, 3), "uint8[H, W, 3]", "u1")
    prompt = _get(message, PROMPT)
    if not isinstance(prompt, str):
        raise ObservationError(explain(PROMPT, "text", type(prompt).__name__, "Say what the arm should do."))
    state = _floats(STATE, _get(message, STATE), (None,))
    observation = Observation(images, state, prompt, _int(message, "stamp_ns"))
    committed = message.get("committed")
    context = InferContext(
        executed=_int(message, "executed", 0, _MAX_EXECUTED),
        committed=None if committed is None else _actions("committed", committed, robot),
        start_ns=_int(message, "start_ns"),
        seed=_int(message, "seed"),
        episode_seed=None if message.get("episode_seed") is None else _int(message, "episode_seed"),
        **_read_previous(message.get("previous"), robot),
    )
    return observation, context


def _read_previous(given: Any, robot: Embodiment) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or set(given) - {"ids"} != _PREVIOUS:
        got = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise ObservationError(explain("previous", sorted(_PREVIOUS), got, "Send the chunk as it was answered."))
    actions = _actions("previous.actions", given["actions"], robot)
    period_s = given["period_s"]
    if not isinstance(period_s, float) or not 0 < period_s < 1e3 or not len(actions):
        got = f"{period_s!r} and {len(actions)} actions"
        raise ObservationError(explain("previous", "a period in seconds and at least 1 action", got, "Send both."))
    return {"previous": ActionChunk(actions, _int(given, "start_ns"), period_s)}


# ---- answers ----
def write_answer(result: InferResult, timing: Mapping[str, float]) -> dict[str, Any]:
    """A result as a message."""
    report = asdict(result.report)
    kept = result.report.kept_tokens
    report |= {"ids": [int(i) for i in result.report.ids], "kept_tokens": None if kept is None else kept.tolist()}
    chunk = result.chunk
    return {
        "actions": np.asarray(chunk.actions, np.float32), "start_ns": int(chunk.start_ns),
        "period_s": float(chunk.period_s), "report": report, "server_timing": dict(timing),
    }  # fmt: skip


def read_answer(message: Any, hello: Hello, address: str) -> tuple[InferResult, dict[str, float]]:
    """Undo `write_answer`: the result and the server's times. TransportError for anything but 1 to `horizon` finite
    actions of the robot."""
    try:
        actions = _actions("actions", message["actions"], hello.embodiment)
        if not 1 <= len(actions) <= hello.horizon:
            raise ObservationError(explain("actions", f"1 to {hello.horizon}", len(actions), "Update the server."))
        given, kept = dict(message["report"]), message["report"]["kept_tokens"]
        given |= {"ids": tuple(given["ids"]), "kept_tokens": None if kept is None else np.asarray(kept, np.int64)}
        chunk = ActionChunk(actions, _int(message, "start_ns"), float(message["period_s"]))
        return InferResult(chunk, DecodeReport(**given)), dict(message["server_timing"])
    except (KeyError, TypeError, ValueError, VlaError) as error:
        what = f"{type(error).__name__}: {error}"
        raise TransportError(explain(address, "an answer with actions", what, "Update the server.")) from error


# ---- errors ----
def write_error(error: VlaError) -> str:
    """As text: openpi's clients raise it as it is."""
    return f"{type(error).__name__}: {error}"


def read_error(text: str) -> VlaError:
    """The exception that `write_error` was given; TransportError for any other text."""
    name, _, message = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, VlaError):
        return kind(message)
    return TransportError(text)


# ---- fields ----
def _get(message: Mapping[str, Any], key: str) -> Any:
    if message.get(key) is None:
        raise ObservationError(explain(key, "a value", "nothing", f"The message has {sorted(message)[:20]}."))
    return message[key]


def _int(message: Mapping[str, Any], key: str, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    value = message.get(key)
    value = 0 if value is None else value
    if type(value) is not int or not low <= value <= high:
        raise ObservationError(explain(key, f"an integer from {low} to {high}", repr(value)[:60], "Correct it."))
    return value


def _array(key: str, value: Any, shape: tuple[int | None, ...], words: str, dtype: str = "") -> np.ndarray:
    """`value` when it is an array of this shape (None: any size) and of `dtype`, or of any real one."""
    fits = isinstance(value, np.ndarray) and (value.dtype == dtype if dtype else value.dtype.kind in "fiu")
    if not fits or value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape)):
        got = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ObservationError(explain(key, words, got, "Convert it before sending."))
    return value


def _floats(key: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """float32 of any real array, or of a list of numbers."""
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        value = np.array(value, np.float64)
    words = f"float32{['N' if n is None else n for n in shape]}".replace("'", "")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
        return np.asarray(_array(key, value, shape, words), np.float32)


def _actions(key: str, value: Any, robot: Embodiment) -> np.ndarray:
    actions = _floats(key, value, (None, robot.action_dim))
    if not np.all(np.isfinite(actions)):
        raise ObservationError(explain(key, "finite actions", "NaN or infinity", "Send what was executed."))
    return actions


def _words(protocol: Any, version: Any) -> str:
    return f"{protocol!r} version {version!r}"[:80] if protocol is not None else "another protocol"
