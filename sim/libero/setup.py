"""`vla setup libero`: the packages and assets of the LIBERO and robosuite environments.

    setup_libero()                                        # what `vla setup libero` does
    setup_libero(assets="~/libero_assets")                # remember this copy of the assets
    setup_libero(download=True)                           # fetch the assets from the Hugging Face Hub

hf-libero and robosuite declare far more than a simulator needs (robomimic, wandb, transformers, a CUDA torch: 7 GB)
and pin each other to versions that do not exist together. They are installed without their own dependencies, next to
the few packages their simulation code imports. Nothing that is already installed changes its version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sim.libero.assets import check_assets, config_file, download_folder, resolve_assets
from vla.errors import SimulationError, explain

WITHOUT_DEPENDENCIES = ("hf-libero==0.1.4", "robosuite==1.4.1", "bddl==1.0.1")
# What the simulation code of the three imports beyond the base install. bddl uses `future` without declaring it.
WITH_DEPENDENCIES = (
    "numba>=0.61",
    "opencv-python-headless>=4.9",
    "easydict>=1.10",
    "future>=1.0",
    "termcolor>=2.3",
    "cloudpickle>=3.0",
)
KEEP = ("numpy", "torch", "mujoco", "scipy", "gymnasium", "matplotlib")
HUB_REPOSITORY = "lerobot/libero-assets"


@dataclass(frozen=True)
class SetupReport:
    """installed: requirements that pip was asked for. present: those that were there. assets: the folder in use."""

    installed: tuple[str, ...]
    present: tuple[str, ...]
    assets: Path

    def lines(self) -> list[str]:
        return [
            f"installed: {', '.join(self.installed) or 'nothing, all present'}",
            f"present:   {', '.join(self.present) or 'none'}",
            f"assets:    {self.assets}",
        ]


def setup_libero(
    assets: str | Path | None = None,
    *,
    download: bool = False,
    constraints: str | Path | None = None,
    echo: Callable[[str], None] = print,
) -> SetupReport:
    """Install what is missing into the running interpreter's environment, find the assets, and try an import.

    assets: a folder to remember in the user's config. download: fetch the assets when none are found.
    constraints: a pip constraints file; the project's own constraints.txt is used when it lies at hand.
    Idempotent. Raises SimulationError, with the remedy, when pip fails, assets are absent or the import fails.
    """
    wanted = (*WITHOUT_DEPENDENCIES, *WITH_DEPENDENCIES)
    missing = [requirement for requirement in wanted if not _satisfied(requirement)]
    if missing:
        _install(missing, _constraints(constraints), echo)
    importlib.invalidate_caches()
    folder = _find_assets(assets, download, echo)
    _try_import(folder)
    report = SetupReport(tuple(missing), tuple(r for r in wanted if r not in missing), folder)
    for line in report.lines():
        echo(line)
    return report


def _install(missing: Sequence[str], constraints: Path | None, echo: Callable[[str], None]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise SimulationError(
            explain("pip", "pip in this environment", "none", f"Run `{sys.executable} -m ensurepip`, then again.")
        )
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "keep.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in _versions(KEEP).items()))
        limits = ["-c", str(pins)] + (["-c", str(constraints)] if constraints else [])
        plain = [requirement for requirement in missing if requirement in WITH_DEPENDENCIES]
        bare = [requirement for requirement in missing if requirement in WITHOUT_DEPENDENCIES]
        if plain:
            echo(f"pip install {' '.join(plain)}")
            _pip("install", *limits, *plain)
        if bare:
            echo(f"pip install --no-deps {' '.join(bare)}")
            _pip("install", "--no-deps", *bare)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise SimulationError(
            f"`pip {' '.join(arguments)}` failed:\n{tail}\n"
            "Check the network and the package index (pip config list), then run `vla setup libero` again."
        )


def _find_assets(assets: str | Path | None, download: bool, echo: Callable[[str], None]) -> Path:
    if assets is not None:
        folder = check_assets(Path(assets).expanduser(), "--assets")
        _remember(folder)
        echo(f"{config_file()} now names these assets")
        return folder
    try:
        return resolve_assets()
    except SimulationError:
        if not download:
            raise
    echo(f"downloading {HUB_REPOSITORY} to {download_folder()}")
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_REPOSITORY, repo_type="dataset", local_dir=download_folder())
    except Exception as error:  # the hub client has no single base class over network and HTTP errors
        raise SimulationError(
            f"downloading {HUB_REPOSITORY} failed: {error}. Check the network, or pass a copy with --assets DIR."
        ) from error
    return check_assets(download_folder(), "download")


def _remember(folder: Path) -> None:
    target = config_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(yaml.safe_dump({"assets": str(folder)}))
    scratch.replace(target)


def _try_import(assets: Path) -> None:
    """In a fresh process: packages installed a moment ago are not seen reliably by the one that installed them."""
    code = (
        "import sys; from sim.libero.assets import import_libero; import_libero(sys.argv[1]); import libero.libero.envs"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(assets)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise SimulationError(f"the LIBERO packages are installed but cannot be imported:\n{tail}\nRun `vla doctor`.")


def _constraints(named: str | Path | None) -> Path | None:
    """The constraints file: the one named, else the project's own when this is a checkout, else none."""
    if named is not None:
        if not Path(named).is_file():
            raise SimulationError(
                explain("constraints", "a pip constraints file", f"{named}, absent", "Check the path.")
            )
        return Path(named)
    own = Path(__file__).resolve().parents[2] / "constraints.txt"
    return own if own.is_file() else None


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _satisfied(requirement: str) -> bool:
    """Exact pins compare equal; minimum versions compare by their leading numbers."""
    name, relation, version = requirement.partition("==") if "==" in requirement else requirement.partition(">=")
    have = _versions([name]).get(name)
    if have is None:
        return False
    return have == version if relation == "==" else _numbers(have) >= _numbers(version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())
