"""Any bytes at all, into everything that reads messages: python -m tests.remote.fuzz_messages --seconds 600

Coverage-guided by atheris (pip install -e '.[fuzz]'), which also sees inside msgpack's own Python code. `--drawn` needs
no atheris: hypothesis draws and mutates, blindly. Every input goes through both of msgpack's readers, the Python and
the C one, and with `--server ws://HOST:PORT` one in TO_SERVER goes to that server, which has to answer it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from vla.embodiment import Camera, Embodiment
from vla.errors import ConfigError, ObservationError, TransportError, VlaError
from vla.policy import InferContext, InferResult
from vla.types import ActionChunk, ControlMode, Observation

TO_SERVER = 50
GUIDED = __name__ == "__main__" and "--drawn" not in sys.argv
if GUIDED:
    try:
        import atheris
    except ImportError as error:
        sys.exit(f"atheris: expected it installed, got {error}. pip install -e '.[fuzz]', or say --drawn.")
    os.environ["MSGPACK_PUREPYTHON"] = "1"  # what `import msgpack` finds below, and the fuzzer looks into
with atheris.instrument_imports(include=["msgpack", "policies.remote"]) if GUIDED else contextlib.nullcontext():
    import msgpack.fallback

    from policies.hold import HoldPolicy
    from policies.remote import packing, protocol
    from policies.remote.batching import infer_each


ROBOT = Embodiment(
    "toy", 20, "osc_delta", ("dx", "gripper"), ("m", "1"), ("x", "y"), "none", 1, ControlMode.OSC_DELTA,
    (Camera("front", 2, 2),),
)  # fmt: skip
HELLO = protocol.Hello(ROBOT, 4)
_PLAIN = SimpleNamespace(
    Unpacker=msgpack.fallback.Unpacker, UnpackException=msgpack.UnpackException, packb=msgpack.packb
)
_FAST = SimpleNamespace(**{**vars(_PLAIN), "Unpacker": importlib.import_module("msgpack._cmsgpack").Unpacker})


def _seeds() -> list[bytes]:
    """Honest messages of every kind."""
    actions = np.zeros((2, 2), np.float32)
    seen = Observation({"front": np.zeros((4, 4, 3), np.uint8)}, np.zeros(2, np.float32), "push", 5)
    context = InferContext(ActionChunk(actions, 1, 0.05), 1, actions[:1], 3, 4, 5)
    answer = protocol.write_answer(InferResult(ActionChunk(actions, 1, 0.05)), {"infer_ms": 1.0})
    bare = {"observation/images/front": seen.images["front"], "observation/state": [0.0, 1], "prompt": "push"}
    messages = [protocol.write_request(seen, context), bare, answer, HELLO.to_dict(), {"x": np.float32(1)}]
    return [packing.encode(message) for message in messages]


SEEDS = _seeds()
WORDS = (
    "__ndarray__", "__npgeneric__", "data", "dtype", "shape", *packing.DTYPES, *protocol.OPTIONAL, protocol.STATE,
    "observation/images/front", protocol.PROMPT, "actions", "period_s", "ids", "report", "server_timing",
)  # fmt: skip


def check(data: bytes) -> None:
    """Raises, if some reader does anything but read or refuse by name."""
    found = [_read(data, library) for library in (_PLAIN, _FAST)]
    assert found[0] == found[1], "the two readers disagree"


def _read(data: bytes, library: Any) -> bytes | None:
    """What `data` stands for, encoded anew; None when it was refused."""
    usual, packing.msgpack = packing.msgpack, library
    try:
        value = packing.decode(data)
    except TransportError:
        return None
    finally:
        packing.msgpack = usual
    again = packing.encode(value)
    assert packing.encode(packing.decode(again)) == again
    with contextlib.suppress(ObservationError):
        asked = protocol.read_request(value, ROBOT)
        (result,) = infer_each(HoldPolicy(ROBOT), [asked])
        assert isinstance(result, (InferResult, VlaError)), repr(result)
        written = packing.encode(protocol.write_request(*asked))
        assert packing.encode(protocol.write_request(*protocol.read_request(packing.decode(written), ROBOT))) == written
    with contextlib.suppress(TransportError):
        protocol.read_answer(value, HELLO, "here")
    with contextlib.suppress(TransportError, ConfigError):
        protocol.Hello.read(value, "here")
    return again


class Live:
    """Gives some of the inputs to a server as well, over one connection after the other."""

    def __init__(self, address: str):
        self._address, self._count = address, 0
        self._connection: ClientConnection | None = None

    def check(self, data: bytes) -> None:
        """As `check`; raises, if the server gives this input no answer."""
        check(data)
        self._count += 1
        if self._count % TO_SERVER:
            return
        for fresh in (False, True):
            if self._connection is None:
                self._connection = connect(self._address, compression=None).__enter__()  # never left
                self._connection.recv(timeout=9)  # the hello
            try:
                self._connection.send(data)
                self._connection.recv(timeout=9)
                return
            except ConnectionClosed:
                self._connection = None
                assert not fresh, "the server hung up on a message that is not too large"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--drawn", action="store_true", help="hypothesis instead of atheris")
    parser.add_argument("--server", metavar="ADDRESS", help="of a `vla serve` without a token")
    args = parser.parse_args()
    once = Live(args.server).check if args.server else check
    if args.drawn:
        return _drawn(args.seconds, once)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)
        words = Path(folder) / "words"
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        limits = [f"-max_total_time={args.seconds}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *limits, f"-dict={words}", str(corpus)], once)
        atheris.Fuzz()  # ends the process


def _drawn(seconds: int, once: Callable[[bytes], None]) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    edit = st.tuples(st.integers(0, 600), st.integers(0, 9), st.binary(max_size=9))

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SEEDS), st.lists(edit))
    def mutate(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        body = bytearray(seed)
        for at, cut, new in edits:
            body[at : at + cut] = new
        once(bytes(body))

    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        mutate()
        count += 200
    print(f"{count} inputs, nothing found")


if __name__ == "__main__":
    main()
