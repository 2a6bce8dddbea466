"""Who may import whom, read from the imports of every file; and the light rooms really load without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vla", "policies", "sim", "ros_nodes")

# room -> packages of ours that it must not import. Rooms are matched by longest prefix.
FORBIDDEN = {
    "vla": {"policies", "sim", "ros_nodes", "vla.cli"},
    "vla.cli": set(),
    "policies": {"sim", "ros_nodes", "vla.cli"},
    "sim": {"ros_nodes", "vla.cli"},
    "ros_nodes": {"sim", "vla.cli"},
    "ros_nodes.sim_node": {"vla.cli"},
}

NUMPY_ONLY = ("vla.types", "vla.embodiment", "vla.policy", "vla.errors", "vla.resources")
# What a robot's own computer loads to be driven from elsewhere: numpy, and what speaks over the socket.
CLIENT_ONLY = tuple(f"policies.remote.{name}" for name in ("packing", "protocol", "client"))
NO_TORCH = (
    *NUMPY_ONLY, "vla.runtime",
    "policies.hold", "policies.ensembling_policy", "policies.reuse_policy", "policies.parts", "policies.remote",
)  # fmt: skip
# third-party packages -> rooms that may import them
ONLY_IN = {
    "mujoco": ("vla.runtime.kinematics", "sim"),
    "mink": ("vla.runtime.kinematics",),
    "hydra": ("vla.cli",),
    "omegaconf": ("vla.cli",),
    "rclpy": ("ros_nodes",),
    "cyclonedds": ("ros_nodes",),
    "websockets": ("policies.remote",),
    "msgpack": ("policies.remote",),
    "pickle": (),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module named by an import, lazy ones in functions included, relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


MODULES = list(modules())


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 10


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_go_downward(name: str, path: Path) -> None:
    room = max((room for room in FORBIDDEN if inside(name, room)), key=len)
    wrong = sorted({i for i in imports(name, path) for bad in FORBIDDEN[room] if inside(i, bad)})
    assert not wrong, f"{name} is in room {room!r} and must not import {wrong}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_third_parties_stay_in_their_rooms(name: str, path: Path) -> None:
    for package, rooms in ONLY_IN.items():
        if not any(inside(name, room) for room in rooms):
            wrong = sorted({i for i in imports(name, path) if inside(i, package)})
            assert not wrong, f"{name} must not import {wrong}; only {rooms or 'nobody'} may"


@pytest.mark.parametrize(
    ("name", "path"),
    [(n, p) for n, p in MODULES if any(inside(n, room) for room in NUMPY_ONLY)],
    ids=[n for n, _ in MODULES if any(inside(n, room) for room in NUMPY_ONLY)],
)
def test_core_types_need_numpy_only(name: str, path: Path) -> None:
    wrong = {i.split(".")[0] for i in imports(name, path)} - set(sys.stdlib_module_names) - {"vla", "numpy", "yaml"}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize(("name", "path"), [(n, p) for n, p in MODULES if n in CLIENT_ONLY], ids=CLIENT_ONLY)
def test_a_remote_client_needs_little(name: str, path: Path) -> None:
    wrong = {i.split(".")[0] for i in imports(name, path)} - set(sys.stdlib_module_names)
    assert wrong <= {"vla", "policies", "numpy", "websockets", "msgpack"}, f"{name} imports {sorted(wrong)}"
    ours = {i for i in imports(name, path) if i.startswith(("vla.", "policies."))}
    light = (*NUMPY_ONLY, "vla", "policies", "policies.remote")
    assert all(any(inside(i, room) for room in light) for i in ours), f"{name} imports {sorted(ours)}"


def test_light_rooms_load_without_torch() -> None:
    """A finder that refuses torch stands in for the computer beside the arm that has none."""
    names = [n for n, _ in MODULES if any(inside(n, room) for room in NO_TORCH)]
    code = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ImportError('torch was imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launch_folder_is_no_package() -> None:
    """An __init__.py here would shadow the Python package `launch` of ROS 2."""
    assert not (ROOT / "launch" / "__init__.py").exists()


def test_no_file_outgrows_its_idea() -> None:
    long = {name: n for name, path in MODULES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long, f"past 500 lines a module holds two ideas: {long}"
