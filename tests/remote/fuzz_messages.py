"""Any bytes at all, into everything that reads messages: python -m tests.remote.fuzz_messages --seconds 600

Coverage-guided by atheris (pip install atheris), which then also sees inside msgpack's own Python code; without it,
hypothesis draws and mutates. Every input goes through both of msgpack's readers, the Python and the C one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla.embodiment import Camera, Embodiment
from vla.errors import ConfigError, ObservationError, TransportError, VlaError
from vla.policy import InferContext, InferResult
from vla.types import ActionChunk, ControlMode, Observation

GUIDED = __name__ == "__main__" and importlib.util.find_spec("atheris") is not None
if GUIDED:
    import atheris

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
    context = InferContext(ActionChunk(actions, 1, 0.05), (1, 2), 1, actions[:1], 3, 4, 5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    seconds = parser.parse_args().seconds
    if not GUIDED:
        return _without_atheris(seconds)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)
        words = Path(folder) / "words"
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        limits = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *limits, f"-dict={words}", str(corpus)], check)
        atheris.Fuzz()  # ends the process


def _without_atheris(seconds: int) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    edit = st.tuples(st.integers(0, 600), st.integers(0, 9), st.binary(max_size=9))

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SEEDS), st.lists(edit))
    def mutate(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        body = bytearray(seed)
        for at, cut, new in edits:
            body[at : at + cut] = new
        check(bytes(body))

    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        mutate()
        count += 2000
    print(f"{count} inputs, nothing found")


if __name__ == "__main__":
    main()
