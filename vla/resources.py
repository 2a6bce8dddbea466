"""Files that travel with the package: configs, embodiments, robot models, pretrained bundles. numpy only.

In a checkout they lie in `configs/` and `policies/pretrained/`; in an installed wheel in `vla/_configs/` and in
`policies/pretrained/` beside the `vla` package. Everything that ships is found through this module.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from vla.embodiment import Embodiment
from vla.errors import BundleError, ConfigError, explain, nearest

_PACKAGE = Path(__file__).resolve().parent
BUNDLE_MARKER = "bundle.json"


def config_dir() -> Path:
    """The folder with the shipped configs; raises ConfigError when the installation is incomplete."""
    for candidate in (_PACKAGE / "_configs", _PACKAGE.parent / "configs"):
        if candidate.is_dir():
            return candidate
    raise ConfigError(explain("configs", "vla/_configs or configs/", "neither", "Reinstall: pip install vla-stack."))


def embodiment_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (config_dir() / "embodiment").glob("*.yaml")))


def load_embodiment(name: str | Path) -> Embodiment:
    """Embodiment by shipped name, or from a YAML file of the user's own (anything that ends with .yaml or .yml), whose
    robot_model may lie beside it."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = config_dir() / "embodiment" / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(f"embodiment: {str(name)!r} is unknown. {nearest(str(name), embodiment_names())}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(explain("embodiment", "a readable file", str(error), "Check the path.")) from error
    except yaml.YAMLError as error:
        raise ConfigError(explain(str(path), "valid YAML", str(error), "Correct the file.")) from error
    if not isinstance(data, dict):
        raise ConfigError(explain(str(path), "a mapping of fields", type(data).__name__, "See the shipped examples."))
    model = path.parent / str(data.get("robot_model") or "")
    if model.is_file():  # beside a file of the user's own; shipped ones lie in a folder of theirs
        data["robot_model"] = str(model.resolve())
    return Embodiment.from_dict(data)


def robot_model(embodiment: Embodiment) -> Path:
    """The MJCF or URDF file of an embodiment: an absolute path as it is, else inside the shipped models folder."""
    if not embodiment.robot_model:
        raise ConfigError(
            explain(
                f"{embodiment.name}.robot_model", "a model file", "none", "Kinematics need one; name it in the YAML."
            )
        )
    path = Path(embodiment.robot_model)
    if not path.is_absolute():
        path = config_dir() / "embodiment" / "models" / path
    if not path.is_file():
        raise ConfigError(explain(f"{embodiment.name}.robot_model", "an existing file", path, "Correct robot_model."))
    return path


def pretrained_dir() -> Path:
    return _PACKAGE.parent / "policies" / "pretrained"


def pretrained_names() -> tuple[str, ...]:
    """Names of the bundles that ship with the package."""
    return tuple(sorted(path.parent.name for path in pretrained_dir().glob(f"*/{BUNDLE_MARKER}")))


def is_address(policy: str) -> bool:
    """Whether a policy of this name runs elsewhere, behind a websocket."""
    return policy.startswith(("ws://", "wss://"))


def bundle_path(name: str | Path) -> Path:
    """A bundle folder: a path that exists, or the name of a shipped bundle; raises BundleError naming what is there."""
    path = Path(name)
    if path.is_dir():
        return path
    shipped = pretrained_dir() / str(name)
    if shipped.is_dir():
        return shipped
    raise BundleError(
        f"bundle {str(name)!r}: no such folder and no shipped bundle. {nearest(str(name), pretrained_names())}"
    )
