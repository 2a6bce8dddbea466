"""The long run of the fuzzer, as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_of_any_bytes() -> None:
    command = [sys.executable, "-m", "tests.remote.fuzz_messages", "--seconds", "600"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
