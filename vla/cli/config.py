"""Hydra at the edge: compose a shipped config with overrides, hand out plain data or the object it describes.

Nothing below `vla/cli` sees Hydra. A config holds `_target_` and constructor arguments; the constructor is the schema.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.errors import ConfigError, explain, nearest
from vla.resources import config_dir


def compose(name: str, overrides: Sequence[str] = (), directory: Path | None = None) -> dict[str, Any]:
    """The config `name` with `overrides` as plain dicts, lists and scalars.

    overrides: Hydra's grammar (`train.steps=100`, `model=tiny`, `+extra=1`). directory: a config folder of the user's
    own; shipped configs by default. Raises ConfigError, with the nearest known name, for whatever does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
            base = OmegaConf.to_container(hydra_compose(name), resolve=False)
            known_keys = set(_paths(base))
            for item in parsed:
                _check_override(item, known_keys, folder)
            config = hydra_compose(name, overrides=list(overrides))
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(f"config {name!r}: {' '.join(str(error).split())}") from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def build(config: Mapping[str, Any], where: str = "config") -> Any:
    """Call what `_target_` names with the other keys; nested mappings that have a `_target_` are built first.

    Raises ConfigError for an argument that the constructor does not take (nearest name offered) or that is missing.
    Lists given for tuple parameters become tuples.
    """
    target = target_of(config, where)
    arguments: dict[str, Any] = {}
    for key, value in config.items():
        if key != "_target_":
            arguments[key] = _built(value, f"{where}.{key}")
    check_arguments(target, arguments, where)
    return target(**_as_tuples(target, arguments))


def target_of(config: Mapping[str, Any], where: str) -> Any:
    """The callable a config names."""
    name = config.get("_target_")
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(explain(f"{where}._target_", "module.attribute", name, "Say what these arguments construct."))
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(explain(f"{where}._target_", "something importable", name, str(error))) from error


def check_arguments(target: Any, arguments: Mapping[str, Any], where: str) -> None:
    """Bind `arguments` to the signature of `target`, or say which one does not fit."""
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in parameters and not takes_any:
            raise ConfigError(f"{where}: unknown key {key!r}. {nearest(key, parameters)}")
    required = [
        key
        for key, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    missing = [key for key in required if key not in arguments]
    if missing:
        raise ConfigError(explain(where, f"all of {required}", f"no {', '.join(missing)}", "Set them, as key=value."))


def _built(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, where)
        return {key: _built(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_built(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _as_tuples(target: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(arguments)
    for key, parameter in inspect.signature(target).parameters.items():
        if isinstance(out.get(key), list) and str(parameter.annotation).startswith(("tuple", "Tuple", "typing.Tuple")):
            out[key] = tuple(out[key])
    return out


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _paths(value, path)


def _check_override(item: Any, known: set[str], folder: Path) -> None:
    """Refuse a misspelt key before Hydra does: its own message names no neighbour."""
    key = str(item.key_or_group)
    if item.is_add() or item.is_force_add() or key == "hydra" or key.startswith("hydra."):
        return
    if (folder / key).is_dir():
        choices = [path.stem for path in (folder / key).glob("*.yaml")]
        value = item.value()
        if isinstance(value, str) and value not in choices:
            raise ConfigError(f"{key}: unknown choice {value!r}. {nearest(value, choices)}")
        return
    if key in known:
        return
    # Keys below a free-form mapping or a group choice made by another override are left to Hydra.
    parent, _, leaf = key.rpartition(".")
    if parent and (folder / parent.replace(".", "/")).is_dir():
        return
    siblings = {path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent}
    if parent in known or not parent:
        hint = nearest(leaf, siblings)
        if hint.startswith("Known") and (close := [path for path in known if path.rpartition(".")[2] == leaf]):
            hint = f"Did you mean {sorted(close)[0]!r}?"
        raise ConfigError(f"{key}: unknown key {leaf!r}. {hint}")
    raise ConfigError(f"{key}: unknown key. {nearest(key, known)}")
