"""The client that openpi users have, from PyPI, in an environment of its own: it wants numpy 1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.remote import packing, protocol
from policies.remote.server import PolicyServer
from tests.remote.robots import QUICK, ROBOT, Echo, observation
from vla.policy import InferContext

PACKAGES = ("openpi-client==0.1.2", "numpy==1.26.4", "typing_extensions")  # it imports the last and does not say so
ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-stack"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of that environment; it is made once and kept."""
    home = CACHE / f"openpi-client-{sys.version_info[0]}.{sys.version_info[1]}"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
        install = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--quiet"]
        done = subprocess.run([*install, "--no-compile", "--retries", "0", *PACKAGES], capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(home, ignore_errors=True)
            pytest.skip(f"openpi-client could not be installed: {done.stderr.strip().splitlines()[-1]}")
        (home / "complete").touch()
    return home / "bin/python"


CLIENT = """
import json, sys
import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

port, key, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
given = np.load(file)
policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port, api_key=key)
metadata = policy.get_server_metadata()
seen = {name.replace("|", "/"): given[name] for name in given.files} | {"prompt": "push"}
seeded = {**seen, "seed": 7, "episode_seed": np.int64(3)}
first, again = policy.infer(seeded), policy.infer(seeded)
policy.reset()
plain = policy.infer({**seen, "observation/state": seen["observation/state"].tolist()})
try:
    policy.infer({**seen, "prompt": ""})
    error = ""
except RuntimeError as raised:
    error = str(raised)
large = np.repeat(np.repeat(seen["observation/images/wrist"], 2, 0), 2, 1)
resized = policy.infer({**seen, "observation/images/wrist": image_tools.convert_to_uint8(large)})
broker = action_chunk_broker.ActionChunkBroker(policy, metadata["horizon"])
steps = np.stack([broker.infer(seen)["actions"] for _ in range(metadata["horizon"])])
print(json.dumps({
    "numpy": np.__version__, "robot": metadata["embodiment"]["name"], "version": metadata["version"],
    "keys": sorted(first), "timing": sorted(again["server_timing"]), "error": error,
    "chunks": [x.astype("<f4").tobytes().hex() for x in (first["actions"], again["actions"], plain["actions"],
                                                         resized["actions"], steps)],
    "dtype": str(first["actions"].dtype), "shape": first["actions"].shape,
}))
"""


def test_openpis_own_client_is_served(python: Path, tmp_path: Path) -> None:
    policy, given = Echo(), observation(4)
    message = protocol.write_request(given, InferContext())
    arrays = {name: value for name, value in message.items() if isinstance(value, np.ndarray)}
    np.savez(tmp_path / "seen.npz", **{name.replace("/", "|"): value for name, value in arrays.items()})
    with PolicyServer(policy, port=0, limits=QUICK, token="s3cret").running() as address:
        words = [str(python), "-c", CLIENT, address.rpartition(":")[2], "s3cret", str(tmp_path / "seen.npz")]
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["numpy"].startswith("1.") and said["robot"] == ROBOT.name and said["version"] == protocol.VERSION
    assert {"actions", "server_timing"} <= set(said["keys"])
    assert {"infer_ms", "prev_total_ms"} <= set(said["timing"])
    assert "instruction: expected a sentence" in said["error"]
    assert said["dtype"] == "float32" and said["shape"] == [policy.horizon, ROBOT.action_dim]
    wanted = policy.infer_batch([given], [InferContext()])[0].chunk.actions
    assert said["chunks"] == [wanted.tobytes().hex()] * 5
    assert (policy.given[0][1].seed, policy.given[0][1].episode_seed) == (7, 3)
    for seen, _ in policy.given:
        assert all(np.array_equal(seen.images[name], given.images[name]) for name in given.images)
        assert np.array_equal(seen.state, given.state)


def test_the_documented_lines_run(python: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs/how-to/remote-policy.md").read_text(encoding="utf-8")
    ours, openpis = (block.split("```")[0] for block in text.split("```python\n")[1:3])
    with PolicyServer(Echo(), limits=QUICK, port=0).running() as address:
        for interpreter, code in ((sys.executable, ours), (str(python), openpis)):
            file = tmp_path / "lines.py"
            file.write_text(code.replace("8000", address.rpartition(":")[2]))
            environment = {**os.environ, "PYTHONPATH": str(ROOT)} if code is ours else None
            done = subprocess.run(
                [interpreter, str(file)], capture_output=True, text=True, timeout=120, env=environment
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("[[0. 0.")


def test_what_it_packs_is_what_we_pack(python: Path) -> None:
    code = """
import sys, numpy as np
from openpi_client import msgpack_numpy
value = {"a": np.arange(6, dtype=np.uint8).reshape(1, 2, 3), "b": {"c": [1, 2.5, "x", None, np.float32(0.5)]}}
sys.stdout.write(msgpack_numpy.packb(value).hex())
theirs = msgpack_numpy.unpackb(bytes.fromhex(sys.stdin.read()))
assert theirs["a"].dtype == np.uint8 and theirs["a"].tolist() == value["a"].tolist() and theirs["b"] == value["b"]
"""
    value = {"a": np.arange(6, dtype=np.uint8).reshape(1, 2, 3), "b": {"c": [1, 2.5, "x", None, np.float32(0.5)]}}
    mine = packing.encode(value)
    done = subprocess.run([str(python), "-c", code], input=mine.hex(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert bytes.fromhex(done.stdout) == mine
