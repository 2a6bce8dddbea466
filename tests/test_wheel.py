"""The wheel holds everything it needs: installed alone, it works from an empty folder, without the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(bin folder of an environment that has the wheel and borrows its dependencies, an empty working folder)."""
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # A path file only adds a folder: it does not run the path files of that folder, so the checkout stays out.
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    done = subprocess.run([*command, "--ignore-installed"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "bin", tmp_path_factory.mktemp("folder")


def run(empty: tuple[Path, Path], *words: str) -> subprocess.CompletedProcess[str]:
    binary, folder = empty
    return subprocess.run([str(binary / words[0]), *words[1:]], cwd=folder, capture_output=True, text=True, timeout=240)


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"vla/_configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert shipped <= names, shipped - names
    bundles = {str(p.relative_to(ROOT)) for p in (ROOT / "policies/pretrained").rglob("*") if p.is_file()}
    assert bundles <= names, bundles - names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_packages_come_from_the_wheel(empty: tuple[Path, Path]) -> None:
    code = "import vla, sim, policies, ros_nodes; print(*[m.__file__ for m in (vla, sim, policies, ros_nodes)])"
    done = run(empty, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout.replace(str(ROOT / ".venv"), "")


def test_commands_work_in_an_empty_folder(empty: tuple[Path, Path]) -> None:
    assert "vla demo" in run(empty, "vla", "--help").stdout
    shown = run(empty, "vla", "train", "--show", "data=somewhere")
    assert shown.returncode == 0 and "TrainConfig" in shown.stdout, shown.stderr
    doctor = run(empty, "vla", "doctor", "--only", "dds", "--json")
    assert json.loads(doctor.stdout)["usable"], doctor.stdout


def test_demo_works_in_an_empty_folder(empty: tuple[Path, Path]) -> None:
    done = run(empty, "vla", "demo", "--policy", "expert", "--episodes", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["successes"] == 1
    assert (empty[1] / "outputs/demo/report.html").is_file()


def test_shipped_bundles_load(empty: tuple[Path, Path]) -> None:
    for marker in (ROOT / "policies/pretrained").glob("*/bundle.json"):
        done = run(empty, "vla", "info", marker.parent.name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["parameters"] > 0
