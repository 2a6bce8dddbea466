"""Plain configs to objects: `_target_` names what is called with the other keys, and its signature is the schema."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any

import yaml

from vla.errors import ConfigError, explain, nearest
from vla.resources import config_dir

# What a constructor annotates where infinity makes sense; a plain float is finite.
Unbounded = Annotated[float, "or infinity"]

# What may stand for a scalar annotation, and what to do about anything else.
_SCALARS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "Write it without a point."),
    float: ("a finite number", "Write it as 0.5 or 1.0e-3."),
    Unbounded: ("a number or .inf", "Write it as 0.5 or 1.0e-3."),
    bool: ("true or false", "Write one of them."),
    str: ("a text", "Put it in quotes."),
    type(None): ("null", "Write null."),
}


def names(group: str) -> tuple[str, ...]:
    """The shipped configs of one group, a folder of configs/."""
    return tuple(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))


def load(group: str, name: str, options: Sequence[str] = ()) -> Any:
    """What configs/GROUP/NAME.yaml constructs, without Hydra: the computer beside the arm need not have it.

    options: "key=value" each, values as in YAML. Raises ConfigError with the nearest name for what is unknown.
    """
    if name not in names(group):
        raise ConfigError(f"{group}: unknown choice {name!r}. {nearest(name, names(group))}")
    path = config_dir() / group / f"{name}.yaml"
    config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(explain(f"{group} option", "key=value", option, f"For example: {key}=1."))
        if key not in config:
            raise ConfigError(f"{group} {name}: unknown key {key!r}. {nearest(key, set(config) - {'_target_'})}")
        config[key] = yaml.safe_load(value)
    return build(config, group)


def describe(thing: Any) -> dict[str, Any]:
    """The config that constructs `thing`: its class and the constructor's arguments, kept under their names."""
    kind = type(thing)
    arguments = {key: getattr(thing, key) for key in inspect.signature(kind).parameters}
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **arguments}


def build(config: Mapping[str, Any], where: str = "config") -> Any:
    """Call what `_target_` names with the other keys.

    Nested mappings are built first when they have a `_target_` of their own, or when the parameter is a dataclass, or a
    tuple of one.
    Raises ConfigError for an argument that the constructor does not take (nearest name offered), that is missing, or
    that is not of the type annotated (see `check_arguments`). Lists given for tuple parameters become tuples.
    """
    return _construct(target_of(config, where), {k: v for k, v in config.items() if k != "_target_"}, where)


def _construct(target: Any, arguments: Mapping[str, Any], where: str) -> Any:
    check_arguments(target, arguments, where)
    hints = _hints(target)
    built = {}
    for key, value in arguments.items():
        kind = hints.get(key)
        item = _built(value, f"{where}.{key}")
        if isinstance(item, Mapping) and dataclasses.is_dataclass(kind):
            item = _construct(kind, item, f"{where}.{key}")
        elif isinstance(item, list) and (kind is tuple or typing.get_origin(kind) is tuple):
            element = next(iter(typing.get_args(kind)), None)
            item = tuple(
                _construct(element, each, f"{where}.{key}[{place}]")
                if isinstance(each, Mapping) and dataclasses.is_dataclass(element)
                else each
                for place, each in enumerate(item)
            )
        built[key] = item
    return target(**built)


def _hints(target: Any) -> dict[str, Any]:
    """Resolved parameter types; {} where they name things that are not importable at run time."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except NameError:
        return {}


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
    """Bind `arguments` to the signature of `target`, or say which one does not fit.

    Those annotated int, float, bool, str, or a union of them and None have to be that; a float is finite, an Unbounded
    one may be infinite.
    """
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
    hints = _hints(target)
    for key, value in arguments.items():
        kinds = _alternatives(hints.get(key))
        if not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(_SCALARS[kind][0] for kind in kinds)
            raise ConfigError(explain(f"{where}.{key}", expected, repr(value), _SCALARS[kinds[0]][1]))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` may stand where one scalar type is annotated; other types are their constructors' business."""
    if kind not in _SCALARS or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if kind in (float, Unbounded):
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and (math.isfinite(value) or (kind is not float and not math.isnan(value)))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _built(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, where)
        return {key: _built(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_built(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value
