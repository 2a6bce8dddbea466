"""Hydra at the edge: compose a shipped config with overrides, hand out plain data or the object it describes.

Nothing below `vla/cli` sees Hydra. A config holds `_target_` and constructor arguments; the constructor is the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.errors import ConfigError, explain, nearest
from vla.resources import config_dir


def compose(
    name: str, overrides: Sequence[str] = (), directory: Path | None = None, allow_missing: bool = False
) -> dict[str, Any]:
    """The config `name` with `overrides` as plain dicts, lists and scalars.

    overrides: Hydra's grammar (`steps=100`, `model=small`, `+extra=1`). directory: a config folder of the user's
    own; shipped configs by default. allow_missing: leave "???" where a value that has no default is not given.
    Raises ConfigError, with the nearest known name, for whatever does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    folder = Path(directory or config_dir()).resolve()
    if not (folder / f"{name}.yaml").is_file():
        known = [path.stem for path in folder.glob("*.yaml")]
        raise ConfigError(f"config {name!r} is unknown. {nearest(name, known)}")
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(explain(f"override {error.override!r}", "key=value", str(error), "See --help.")) from error
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            groups = [text for text, item in zip(overrides, parsed) if _is_group(item, folder)]
            for item in parsed:
                _check_choice(item, folder)
            base = OmegaConf.to_container(hydra_compose(name, overrides=groups), resolve=False)
            for item in parsed:
                if not _is_group(item, folder):
                    _check_key(item, set(_paths(base)))
            config = hydra_compose(name, overrides=list(overrides))
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=not allow_missing)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ConfigError(explain(key, "a value", "none", f"It has no default: pass {key}=...")) from error
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(f"config {name!r}: {' '.join(str(error).split())}") from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _paths(value, path)


def _is_group(item: Any, folder: Path) -> bool:
    """An override that chooses a file (`model=small`) and so decides which keys there are."""
    return (folder / str(item.key_or_group)).is_dir()


def _check_choice(item: Any, folder: Path) -> None:
    group = str(item.key_or_group)
    if _is_group(item, folder):
        choices = [path.stem for path in (folder / group).glob("*.yaml")]
        value = item.value()
        if isinstance(value, str) and value not in choices:
            raise ConfigError(f"{group}: unknown choice {value!r}. {nearest(value, choices)}")


def _check_key(item: Any, known: set[str]) -> None:
    """Refuse a misspelt key before Hydra does: its own message names no neighbour."""
    key = str(item.key_or_group)
    if key in known or item.is_add() or item.is_force_add() or key == "hydra" or key.startswith("hydra."):
        return
    parent, _, leaf = key.rpartition(".")
    if parent and parent not in known:
        raise ConfigError(f"{key}: unknown key. {nearest(key, known)}")
    siblings = {path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent}
    hint = nearest(leaf, siblings)
    elsewhere = sorted(path for path in known if path.rpartition(".")[2] == leaf)
    if hint.startswith("Known") and elsewhere:
        hint = f"Did you mean {elsewhere[0]!r}?"
    raise ConfigError(f"{key}: unknown key {leaf!r}. {hint}")
