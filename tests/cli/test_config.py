"""Composing and building configs: plain data, exact arguments, the nearest name for a misspelt one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vla.cli.config import compose
from vla.configs import build
from vla.errors import ConfigError


@dataclass(frozen=True)
class Noise:
    level: float = 0.1


@dataclass(frozen=True)
class Job:
    out: str
    steps: int = 10
    shape: tuple[int, ...] = (1, 2)
    noise: Noise = field(default_factory=Noise)
    options: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(
        "defaults:\n  - size: small\n  - _self_\n"
        "job:\n  out: ???\n  steps: 10\n  shape: [3, 4]\n  noise:\n    level: 0.5\n  options: {a: 1}\n"
        "half: ${job.steps}\n"
    )
    (tmp_path / "size").mkdir()
    (tmp_path / "size/small.yaml").write_text("width: 8\n")
    (tmp_path / "size/large.yaml").write_text("width: 64\ndepth: 4\n")
    return tmp_path


def test_overrides_and_groups_give_plain_data(folder: Path) -> None:
    config = compose("job", ["job.out=x", "job.steps=7", "size=large", "size.depth=5"], folder)
    assert config["job"]["steps"] == 7 and config["half"] == 7
    assert config["size"] == {"width": 64, "depth": 5}
    assert type(config) is dict and type(config["job"]) is dict and type(config["job"]["shape"]) is list


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("job.stpes=3", "Did you mean 'steps'?"),
        ("jbo.steps=3", "Did you mean 'job"),
        ("steps=3", "Did you mean 'job.steps'?"),
        ("size=smal", "Did you mean 'small'?"),
        ("size.wdith=3", "Did you mean 'width'?"),
        ("job.steps=[1", "key=value"),
    ],
)
def test_misspelt_override_offers_the_nearest_name(folder: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose("job", ["job.out=x", override], folder)
    assert says in str(raised.value)


def test_missing_value_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.out"):
        compose("job", [], folder)
    assert compose("job", [], folder, allow_missing=True)["job"]["out"] == "???"


def test_unknown_config_offers_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'job'"):
        compose("jobs", [], folder)


def test_build_makes_nested_dataclasses_and_tuples() -> None:
    target = f"{__name__}.Job"
    import sys

    sys.modules.setdefault(__name__, sys.modules[Job.__module__])
    job = build({"_target_": target, "out": "x", "shape": [5], "noise": {"level": 0.9}, "options": {"b": 2}}, "job")
    assert job == Job("x", shape=(5,), noise=Noise(0.9), options={"b": 2})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"out": "x", "stpes": 1}, "Did you mean 'steps'?"),
        ({}, "no out"),
        ({"out": "x", "noise": {"levle": 1.0}}, "Did you mean 'level'?"),
    ],
)
def test_arguments_must_fit_the_constructor(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        build({"_target_": f"{__name__}.Job", **arguments}, "job")


def test_target_must_exist() -> None:
    with pytest.raises(ConfigError, match="importable"):
        build({"_target_": "vla.no_such.Thing"}, "thing")
