"""`vla doctor`: what is found, what is missing, and the remedy; of this machine, or of a robot's live topics."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vla.cli import doctor_live

EPILOG = """With --robot, the topics of a robot instead of this machine; nothing is published and nothing moves.
Exit code: 0 when everything the base install needs is found, or no check of the robot failed; 1 otherwise.

examples:
  vla doctor                                                      this machine
  vla doctor --robot panda --live                                 topics, types, rates, names, stamps, sizes
  vla doctor --robot panda --live --namespace left                of nodes launched with namespace:=left
  vla doctor --robot panda --live --policy outputs/mine/bundle    and: do cameras and joints look as in training?
  vla doctor --robot panda --shadow --policy outputs/mine/bundle --seconds 60    while an operator drives"""
FOUND, MISSING, BROKEN = "found", "missing", "broken"

# Renders two pixels' worth of scene; runs in a child because a wrong GL library can abort the process.
GL_PROBE = """
import mujoco, numpy
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/>'
    '<geom type="sphere" size=".5" rgba="1 0 0 1"/><camera name="c" pos="0 -3 0" xyaxes="1 0 0 0 0 1"/>'
    '</worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data, camera="c")
image = renderer.render()
red = image[16, 16].astype(int)
assert red[0] > red[1] + 20, red
print("rendered")
"""


@dataclass(frozen=True)
class Check:
    """required: the base install does not work without it. detail: what was seen. remedy: one line to type."""

    name: str
    state: str
    detail: str
    remedy: str = ""
    required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--only", metavar="CHECK", choices=sorted(CHECKS), help=f"one check: {', '.join(CHECKS)}")
    parser.epilog = EPILOG
    doctor_live.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.robot or args.live or args.shadow:
        return doctor_live.run(args)
    checks = examine([args.only] if args.only else None)
    usable = all(check.state == FOUND for check in checks if check.required)
    if args.json:
        print(json.dumps({"usable": usable, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
        if not args.only:
            print("\nThe base install is usable." if usable else "\nThe base install is not usable.")
    return 0 if usable else 1


def examine(names: list[str] | None = None) -> list[Check]:
    """The named checks (all: None), in the order a newcomer meets them. One that itself fails is reported as broken."""
    out: list[Check] = []
    for name in CHECKS if names is None else names:
        try:
            result = CHECKS[name]()
        except Exception as error:
            result = Check(name, BROKEN, f"{type(error).__name__}: {error}", "Please report this.", required=True)
        out.extend(result if isinstance(result, list) else [result])
    return out


def _python() -> Check:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if ok else "Install Python 3.10 to 3.13 and make the environment with it."
    return Check("python", FOUND if ok else BROKEN, platform.python_version(), remedy, required=True)


def _versions() -> Check:
    """Compare what is installed with constraints.txt, when the checkout is at hand."""
    path = Path(__file__).resolve().parents[2] / "constraints.txt"
    if not path.is_file():
        return Check("versions", FOUND, "installed without a checkout: constraints not compared")
    from packaging.requirements import Requirement

    differing = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        try:
            have = version(pin.name)
        except PackageNotFoundError:
            continue
        if (pin.marker is None or pin.marker.evaluate()) and not pin.specifier.contains(have.partition("+")[0]):
            differing.append(f"{pin.name} {have} (tested: {pin.specifier})")
    if differing:
        return Check("versions", BROKEN, "; ".join(differing), "pip install -e . -c constraints.txt")
    return Check("versions", FOUND, "as in constraints.txt")


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("torch", MISSING, "not installed", "pip install torch -c constraints.txt", required=True)
    import torch

    return Check("torch", FOUND, f"{torch.__version__}, {torch.get_num_threads()} threads", required=True)


def _gpu() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", MISSING, "torch is not installed", "see torch")
    import torch

    if torch.cuda.is_available():
        return Check("gpu", FOUND, f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    return Check("gpu", MISSING, "no CUDA device; everything runs on the CPU", "optional: a GPU shortens training")


def _gl() -> Check:
    """The first backend that really renders; the one chosen by MUJOCO_GL is tried first."""
    failures = []
    for backend in gl_backends():
        error = probe_gl(backend)
        if not error:
            return Check("offscreen GL", FOUND, f"MUJOCO_GL={backend} renders", required=True)
        failures.append(f"{backend}: {error}")
    return Check("offscreen GL", MISSING, "; ".join(failures), GL_REMEDY, required=True)


GL_REMEDY = "apt-get update && apt-get install -y libosmesa6"


def gl_backends() -> tuple[str, ...]:
    """Backends in the order the renderer tries them: the user's choice, else the GPU if there is one, then software."""
    if chosen := os.environ.get("MUJOCO_GL", ""):
        return (chosen,)
    return ("egl", "osmesa") if Path("/dev/nvidia0").exists() else ("osmesa", "egl")


def probe_gl(backend: str, timeout_s: float = 60.0) -> str:
    """Render a tiny scene in a child process; "" when it worked, else the last line of what went wrong."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", GL_PROBE], env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout_s:.0f} s"
    if done.returncode == 0 and "rendered" in done.stdout:
        return ""
    # Destructors of a half-made context complain after the real error; the first exception line is the cause.
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "Traceback", "Exception"))]
    return lines[0][:200] if lines else f"exit code {done.returncode}"


def _dds() -> Check:
    remedy = "pip install cyclonedds==11.0.1 (wheels: Linux x86_64, macOS arm64, Windows; Python 3.10 to 3.13)"
    if importlib.util.find_spec("cyclonedds") is None:
        return Check("DDS", MISSING, "the cyclonedds package is not installed", remedy, required=True)
    # A participant sends itself a message when it is made; in a child, because a foreign wheel can abort the process.
    code = (
        "from ros_nodes.graph import free_domain; from ros_nodes.wire import Participant; "
        "Participant('vla_doctor', domain=free_domain()).close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Check("DDS", BROKEN, last[:300], remedy, required=True)
    return Check("DDS", FOUND, f"cyclonedds {version('cyclonedds')}: raw messages go round on loopback", required=True)


def _ros() -> Check:
    distro = os.environ.get("ROS_DISTRO", "")
    if importlib.util.find_spec("rclpy") is not None:
        return Check("ROS 2", FOUND, f"rclpy, {distro or 'unknown distribution'}")
    return Check("ROS 2", MISSING, "rclpy is not on the path; the DDS wheel speaks for us", "optional: source ROS 2")


def _bundles() -> list[Check]:
    from vla.checkpoints.bundle import load
    from vla.errors import VlaError
    from vla.resources import pretrained_dir, pretrained_names

    names = pretrained_names()
    if not names:
        remedy = "optional: vla demo runs the scripted expert; vla collect and vla train make one"
        return [Check("bundle", MISSING, f"none in {pretrained_dir()}", remedy)]
    out = []
    for name in names:
        try:
            load(pretrained_dir() / name)
            out.append(Check(f"bundle {name}", FOUND, "complete, hashes agree", required=True))
        except VlaError as error:
            out.append(Check(f"bundle {name}", BROKEN, str(error), "Reinstall, or git checkout the file.", True))
    return out


def _libero() -> Check:
    needed = {"libero": "hf-libero", "robosuite": "robosuite", "bddl": "bddl"}
    have, lack = [], []
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            lack.append(package)
        else:
            have.append(f"{package} {version(package)}")
    if lack:
        return Check("LIBERO", MISSING, f"not installed: {', '.join(lack)}", "optional: vla setup libero")
    return Check("LIBERO", FOUND, ", ".join(have))


def _libero_assets() -> Check:
    remedy = "optional: vla setup libero --assets DIR, or set VLA_LIBERO_ASSETS"
    from sim.libero.assets import resolve_assets
    from vla.errors import SimulationError

    try:
        return Check("LIBERO assets", FOUND, str(resolve_assets()))
    except SimulationError as error:
        return Check("LIBERO assets", MISSING, str(error), remedy)


CHECKS: dict[str, Callable[[], Check | list[Check]]] = {
    "python": _python,
    "versions": _versions,
    "torch": _torch,
    "gpu": _gpu,
    "gl": _gl,
    "dds": _dds,
    "ros": _ros,
    "bundles": _bundles,
    "libero": _libero,
    "assets": _libero_assets,
}


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {FOUND: "green", MISSING: "yellow", BROKEN: "red"}
    table = Table(box=None, pad_edge=False)
    for title in ("what", "state", "seen", "remedy"):
        table.add_column(title, overflow="fold")
    for check in checks:
        colour = "red" if check.required and check.state != FOUND else colours[check.state]
        table.add_row(check.name, f"[{colour}]{check.state}[/]", check.detail, check.remedy)
    Console().print(table)
