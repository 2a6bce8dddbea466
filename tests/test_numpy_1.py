"""Everything also runs with numpy 1.26, for which Ubuntu's packages of ROS are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.remote.test_openpi_client import CACHE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy==1.26.4", "pyarrow<26")  # newer pyarrow wants numpy 2
TESTS = (
    "tests/remote/test_server.py", "tests/decoding/test_continuous.py", "tests/ros/test_messages.py",
    "tests/ros/test_policy_core.py", "tests/runtime", "tests/data",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheel for this Python")
@pytest.mark.timeout(1800)
def test_policies_nodes_and_data_on_numpy_1() -> None:
    home = CACHE / f"numpy-1.26-{sys.version_info[0]}.{sys.version_info[1]}"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "0", "--target", home]
        done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(home, ignore_errors=True)
            pytest.skip(f"numpy 1.26 could not be installed: {done.stderr.strip().splitlines()[-1]}")
        (home / "complete").touch()
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", "import numpy, pytest; assert numpy.__version__ == '1.26.4'; "
               f"raise SystemExit(pytest.main({list(TESTS)}))"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
