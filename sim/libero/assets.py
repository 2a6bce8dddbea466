"""Where LIBERO's meshes and packages are, and how to import them without side effects.

The wheel of hf-libero carries tasks and initial states, not the meshes. Its import asks a question on stdin when it
finds no config file, ignores the `assets` key of that file and, failing that, downloads 1.5 GB. `import_libero` writes
a private config first, points the package at the resolved assets and leaves the installed packages and the user's
environment variables as they were.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from sim.tabletop.rendering import backend
from vla.errors import SimulationError, explain

ASSETS_VARIABLE = "VLA_LIBERO_ASSETS"
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
SETUP_REMEDY = "Run `vla setup libero`."
ASSETS_REMEDY = (
    f"Set {ASSETS_VARIABLE} to the folder, or run `vla setup libero --assets DIR` (a copy you have) "
    "or `vla setup libero --download` (from the Hugging Face Hub)."
)


def config_file() -> Path:
    """The user's own settings for LIBERO: one key, `assets`."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "vla-stack" / "libero.yaml"


def download_folder() -> Path:
    """Where `vla setup libero --download` puts the assets."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vla-stack" / "libero_assets"


def check_assets(folder: Path, origin: str) -> Path:
    """Return `folder` as an absolute path, or raise SimulationError naming the sub-folders it lacks."""
    if not folder.is_dir():
        raise SimulationError(explain(origin, "the folder of the LIBERO assets", f"{folder}, absent", ASSETS_REMEDY))
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise SimulationError(explain(origin, f"folders {list(ASSET_FOLDERS)}", f"{missing} missing", ASSETS_REMEDY))
    return folder.resolve()


def resolve_assets(folder: str | Path | None = None) -> Path:
    """The assets folder: the argument, else $VLA_LIBERO_ASSETS, else the user's config, else the download folder.

    The first that is named must be good: a wrong path is an error, never a reason to look elsewhere.
    """
    if folder is not None:
        return check_assets(Path(folder).expanduser(), "assets")
    if os.environ.get(ASSETS_VARIABLE):
        return check_assets(Path(os.environ[ASSETS_VARIABLE]).expanduser(), ASSETS_VARIABLE)
    if config_file().is_file():
        named = (yaml.safe_load(config_file().read_text()) or {}).get("assets")
        if named:
            return check_assets(Path(named).expanduser(), f"assets in {config_file()}")
    if download_folder().is_dir():
        return check_assets(download_folder(), "assets")
    raise SimulationError(
        explain("LIBERO assets", f"{ASSETS_VARIABLE} or a configured folder", "neither", ASSETS_REMEDY)
    )


def missing_packages() -> list[str]:
    """Names of the packages that LIBERO and robosuite need and that are not installed."""
    return [name for name in ("bddl", "hf-libero", "robosuite") if not _installed(name)]


def unavailable_reason(*, assets: bool = True) -> str:
    """One line saying why these environments cannot run here, or "" when they can."""
    missing = missing_packages()
    if missing:
        return f"packages {missing} are not installed. {SETUP_REMEDY}"
    if assets:
        try:
            resolve_assets()
        except SimulationError as error:
            return str(error)
    return ""


def import_robosuite() -> ModuleType:
    """Import robosuite quietly, on the GL backend that the cameras use.

    robosuite loads a GL library while it is imported, whether or not anything is rendered, and overwrites an unset
    MUJOCO_GL with `egl`: the choice is made here, once, and written down for both.
    """
    if missing_packages():
        raise SimulationError(explain("robosuite", "installed packages", f"{missing_packages()} missing", SETUP_REMEDY))
    os.environ["MUJOCO_GL"] = backend()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns through deprecated calls that its private macros are not set up
            return importlib.import_module("robosuite")
    except (ImportError, AttributeError) as error:  # PyOpenGL raises AttributeError when its library cannot be loaded
        raise SimulationError(
            f"robosuite cannot be imported (MUJOCO_GL={backend()}): {error!r}. {SETUP_REMEDY} "
            "If a GL library is absent: apt-get install -y libosmesa6 (or libegl1)."
        ) from error


def import_libero(assets: str | Path | None = None) -> Any:
    """Import `libero.libero` with its files where they are, and return the module. Idempotent.

    Raises SimulationError when packages or assets are absent; the message says what to do.
    """
    folder = resolve_assets(assets)
    import_robosuite()
    loaded: Any = sys.modules.get("libero.libero")
    if loaded is not None:
        loaded._assets_path_cache = str(folder)
        return loaded
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise SimulationError(explain("libero", "the package of hf-libero", "nothing to import", SETUP_REMEDY))
    root = Path(next(iter(spec.submodule_search_locations))) / "libero"
    with _private_config(root, folder), contextlib.redirect_stdout(io.StringIO()):
        module: Any = importlib.import_module("libero.libero")
    module._assets_path_cache = str(folder)  # the package never reads the `assets` key of its own config
    return module


@contextlib.contextmanager
def _private_config(root: Path, assets: Path) -> Any:
    """LIBERO_CONFIG_PATH at a private folder while the package is imported; the folder lives as long as this process,
    because the package reads the file again at each look-up."""
    folder = Path(tempfile.mkdtemp(prefix="vla-libero-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": folder / "datasets",
        "assets": assets,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({key: str(value) for key, value in paths.items()}))
    before = os.environ.get("LIBERO_CONFIG_PATH")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBERO_CONFIG_PATH"]
        else:
            os.environ["LIBERO_CONFIG_PATH"] = before


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
