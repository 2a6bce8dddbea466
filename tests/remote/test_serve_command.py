"""`vla serve` as a process of its own: where it listens, how it ends, and what the computer beside the arm loads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from policies.remote.client import RemotePolicy
from tests.remote.robots import ROBOT, observation, served
from vla.cli import main as cli
from vla.errors import TransportError
from vla.policy import infer
from vla.resources import pretrained_names

ROOT = Path(__file__).resolve().parents[2]
HOLD = ("--policy", "hold", "--embodiment", "tabletop", "--port", "0")


@contextlib.contextmanager
def serving(*words: str, limit_s: float = 250) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address. It is killed after limit_s."""
    command = [sys.executable, "-m", "vla.cli.main", "serve", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        guard = threading.Timer(limit_s, process.kill)
        guard.start()
        try:
            line = process.stdout.readline()
            assert line.startswith("serving "), line + process.stderr.read()
            yield process, line.split()[-1]
        finally:
            guard.cancel()
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_listens_on_this_machine_only_and_ends_when_told(number: signal.Signals) -> None:
    with serving(*HOLD) as (process, address):
        sockets = psutil.Process(process.pid).net_connections(kind="inet")
        assert [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
        with RemotePolicy(address, ROBOT) as remote, socket.create_connection(("127.0.0.1", sockets[0].laddr.port)):
            assert remote.hello.policy == "hold" and "vla-stack" in remote.hello.software
            infer(remote, observation())
            process.send_signal(number)
            assert process.wait(20) == 0
            with pytest.raises(TransportError, match="a policy server"):
                infer(remote, observation())
        assert "Traceback" not in process.stderr.read()


def test_a_server_that_hangs_costs_a_client_its_time_limit_and_no_more() -> None:
    """Frozen, it neither reads nor answers: a large observation fills the buffers, and sending it blocks."""
    large = {name: np.zeros((1280, 1280, 3), np.uint8) for name in ROBOT.camera_names}
    with serving(*HOLD) as (process, address):
        remote = RemotePolicy(address, timeout_s=20)
        infer(remote, observation(images=large))
        process.send_signal(signal.SIGSTOP)
        remote._timeout_s = 0.5
        for images in (large, observation().images):
            began = time.monotonic()
            with pytest.raises(TransportError, match=r"an answer within 0\.5 s|a policy server|a hello"):
                infer(remote, observation(images=images))
            assert time.monotonic() - began < 4.0
        process.send_signal(signal.SIGCONT)
        remote._timeout_s = 20
        infer(remote, observation())
        remote.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*HOLD, "--host", "0.0.0.0"), "host: expected a loopback address, or a token"),
        ((*HOLD, "--token", "a", "--token-file", "b"), "token"),
        ((*HOLD, "--token-file", "/no/such/file"), "token-file"),
        ((*HOLD, "--tls-cert", "x.pem"), "TLS"),
        ((*HOLD, "--max-batch", "0"), "max_batch"),
        ((*HOLD, "--batch-wait", "inf"), "batch_wait_s: expected a number of at least 0, got inf"),
        ((*HOLD, "--max-message", "nan"), "max-message: expected a number of MiB above 0, got nan"),
        ((*HOLD, "--max-message", "inf"), "max-message: expected a number of MiB above 0, got inf"),
        ((*HOLD, "--max-message", "-1"), "max-message: expected a number of MiB above 0, got -1"),
        # before a policy is looked for, so before a large one loads
        (("--policy", "no such bundle", "--port", "99999999"), "port: expected 0 (a free one) to 65535, got 99999999"),
        (("--policy", "no such bundle", "--port", "-1"), "port: expected 0 (a free one) to 65535, got -1"),
        (("--policy", "hold"), "embodiment"),
        (("--policy", "no such bundle"), "bundle"),
        (("--policy", "tabletop", "--ensembling", "act"), "ensembling: expected on the side of each robot"),
        (("--policy", "tabletop", "--reuse", "flashvla"), "vla demo --policy ws://HOST:PORT --reuse flashvla"),
        (("--policy", "tabletop", "--threads", "0"), "threads: expected 1 or more, got 0"),
        (("--policy", "tabletop", "--device", "cuda:99"), "device: expected auto, cpu, or cuda"),
        (("--policy", "tabletop", "--decoder", "jakobi"), "Did you mean 'jacobi"),
        (("--policy", "tabletop", "--embodiment", "libero"), "robot 'libero' and policy 'tabletop'"),
    ],
)
def test_wrong_use_is_one_message(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "tabletop" in words[1] and "tabletop" not in pretrained_names():
        pytest.skip("no policy is shipped yet")
    assert cli.main(["serve", *words]) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err


def test_the_token_of_a_file_without_the_newline(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with serving(*HOLD, "--token-file", str(file)) as (_, address):
        with pytest.raises(TransportError, match="token"):
            RemotePolicy(address, token="")
        RemotePolicy(address, token="s3cret").close()
    file.write_text("\n")
    assert cli.main(["serve", *HOLD, "--token-file", str(file)]) == cli.EXIT_ERROR


CLIENT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "scipy", "mujoco", "hydra", "yaml", "rich", "pydantic"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import numpy as np
from policies.remote.client import RemotePolicy
from vla.policy import infer
from vla.types import Observation

with RemotePolicy(sys.argv[1]) as policy:
    robot = policy.embodiment
    images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in robot.cameras}
    policy.reset(1)
    result = infer(policy, Observation(images, np.zeros(robot.state_dim, np.float32), "push", 5))
    assert result.chunk.actions.shape == (policy.horizon, robot.action_dim)
files = {name.split(".")[0]: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
print(*(name for name, file in files.items() if "site-packages" in file and name not in ("vla", "policies")))
"""


def test_the_client_needs_numpy_websockets_and_msgpack_and_nothing_else() -> None:
    from policies.hold import HoldPolicy

    with served(HoldPolicy(ROBOT)) as remote:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
        command = [sys.executable, "-c", CLIENT, remote.address]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"_distutils_hack"} == {"numpy", "websockets", "msgpack"}


def test_the_shipped_policy_from_the_command_line_is_the_one_in_process() -> None:
    if "tabletop" not in pretrained_names():
        pytest.skip("no policy is shipped yet")
    from policies.vla_policy import VlaPolicy
    from vla.decoding.autoregressive import AutoregressiveDecoder
    from vla.policy import InferContext
    from vla.resources import bundle_path

    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), AutoregressiveDecoder(temperature=0.7), threads=1)
    policy.reset(5)
    words = ("--policy", "tabletop", "--port", "0", "--decoder", "autoregressive", "temperature=0.7")
    with serving(*words) as (_, address), RemotePolicy(address, policy.embodiment) as remote:
        assert remote.hello.fingerprint == policy.bundle.fingerprint
        assert remote.hello.parts["decoder"]["temperature"] == 0.7
        remote.reset(5)
        for seed in range(3):
            given = observation(seed, instruction="put the red cube on the blue plate")
            here, there = (infer(p, given, InferContext(seed=seed)) for p in (policy, remote))
            assert here.chunk.actions.tobytes() == there.chunk.actions.tobytes()
            assert here.report.ids == there.report.ids
