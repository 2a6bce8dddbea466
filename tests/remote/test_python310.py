"""The oldest Python and numpy that a robot's computer may have: Humble's 3.10, and numpy 1."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from policies.hold import HoldPolicy
from tests.remote.robots import ROBOT, served
from tests.remote.test_openpi_client import CACHE
from tests.remote.test_serve_command import CLIENT
from tests.test_imports import MODULES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy==1.26.4", "websockets", "msgpack")


def test_every_file_is_python_3_10() -> None:
    for _, path in MODULES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter of 3.10 with what the client needs; its environment is made once and kept."""
    home = CACHE / "client-3.10"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        found = [
            *filter(None, [shutil.which("python3.10")]),
            *Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"),
        ]
        made = (subprocess.run([base, "-m", "venv", "--without-pip", home], capture_output=True) for base in found)
        if not any(done.returncode == 0 for done in made):
            pytest.skip("no Python 3.10 is installed here; the syntax is checked anyway")
        install = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--quiet"]
        done = subprocess.run([*install, "--retries", "0", *PACKAGES], capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(home, ignore_errors=True)
            pytest.skip(f"its packages could not be installed: {done.stderr.strip().splitlines()[-1]}")
        (home / "complete").touch()
    return home / "bin/python"


def test_the_client_runs_on_python_3_10_and_numpy_1(python: Path) -> None:
    with served(HoldPolicy(ROBOT)) as remote:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
        tail = "\nprint(sys.version_info[:2], np.__version__)"
        command = [str(python), "-c", CLIENT + tail, remote.address]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(3, 10) 1.26.4"
