"""The long runs of the fuzzer, as commands, beside a server that has to go on serving."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from policies.remote.client import RemotePolicy
from tests.remote.robots import ROBOT, observation
from tests.remote.test_serve_command import HOLD, serving
from vla.policy import infer

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install -e '.[fuzz]'"
)


def fuzz(*words: str) -> str:
    """What the fuzzer says in SECONDS beside a live `vla serve` to which it gives its inputs, too, while an honest
    robot asks once a second and gets the same answer each time."""
    command = [sys.executable, "-m", "tests.remote.fuzz_messages", "--seconds", str(SECONDS), *words]
    with (
        serving(*HOLD, limit_s=SECONDS + 240) as (server, address),
        tempfile.TemporaryFile("w+") as out,
        RemotePolicy(address, ROBOT) as robot,
        subprocess.Popen([*command, "--server", address], cwd=ROOT, stdout=out, stderr=out) as fuzzer,
    ):
        first, asked = infer(robot, observation()).chunk.actions, 1
        try:
            while fuzzer.poll() is None:
                assert np.array_equal(infer(robot, observation()).chunk.actions, first)
                asked += 1
                time.sleep(1.0)
        finally:
            fuzzer.kill()
        assert server.poll() is None and asked > SECONDS / 20
        out.seek(0)
        said = out.read()
        assert fuzzer.returncode == 0, said[-4000:]
    return said


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@needs_atheris
def test_ten_minutes_of_bytes_that_follow_the_code_and_the_server_still_serves() -> None:
    said = fuzz()
    (runs,) = re.findall(r"Done (\d+) runs", said)
    covered = [int(number) for number in re.findall(r"cov: (\d+)", said)]
    assert int(runs) > 10_000 and covered[-1] > covered[0]  # it was guided: what it found led it further


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_ten_minutes_of_drawn_bytes_and_the_server_still_serves() -> None:
    assert "nothing found" in fuzz("--drawn")


def test_a_guided_run_without_the_fuzzer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    monkeypatch.setattr(sys, "argv", ["fuzz_messages", "--seconds", "1"])
    with pytest.raises(SystemExit, match="atheris: expected it installed"):
        runpy.run_module("tests.remote.fuzz_messages", run_name="__main__")
