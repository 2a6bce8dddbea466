"""Every shipped config composes, with every choice of every group, and binds to the constructors it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yaml

from vla.cli.config import compose
from vla.configs import Unbounded, build, check_arguments, describe, load, names, target_of
from vla.errors import ConfigError
from vla.resources import config_dir, embodiment_names, load_embodiment, robot_model

CONFIGS = config_dir()
PRIMARY = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def required(name: str) -> list[str]:
    """Overrides that fill what a config leaves to its user."""
    data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return [f"{key}=somewhere" for key, value in data.items() if value == "???"]


def choices() -> Iterator[tuple[str, list[str]]]:
    for name in PRIMARY:
        yield name, []
        for item in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("defaults", []):
            if isinstance(item, dict):
                (group,) = item
                yield from ((name, [f"{group}={path.stem}"]) for path in sorted((CONFIGS / group).glob("*.yaml")))


def targets(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{where}[{index}]")


CASES = list(choices())


def test_there_are_configs() -> None:
    assert PRIMARY


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=[f"{n} {' '.join(o)}".strip() for n, o in CASES])
def test_config_composes_and_binds(name: str, overrides: list[str]) -> None:
    config = compose(name, [*required(name), *overrides])
    found = list(targets(config, name))
    assert found and found[0][0] == name, f"{name}.yaml does not say what it constructs (_target_)"
    for where, node in found:
        target = target_of(node, where)
        check_arguments(target, {key: value for key, value in node.items() if key != "_target_"}, where)


def test_every_group_file_is_reachable() -> None:
    groups = {path.parent.name for path in CONFIGS.glob("*/*.yaml")} - {"embodiment"}
    reached = {override.partition("=")[0] for _, overrides in CASES for override in overrides}
    assert groups <= reached, f"nobody chooses from {sorted(groups - reached)}"


@pytest.mark.parametrize("name", names("decoder"))
def test_decoders_load_without_hydra_and_describe_themselves(name: str) -> None:
    """What constructs a decoder can be told from the decoder: reports keep it as plain data."""
    decoder = load("decoder", name)
    plain = yaml.safe_load((CONFIGS / "decoder" / f"{name}.yaml").read_text())
    assert describe(decoder) == plain, "the YAML holds every argument with its default"
    assert describe(build(describe(decoder))) == plain
    assert isinstance(decoder.exact, bool)


def test_options_of_a_loaded_config_are_checked() -> None:
    assert load("decoder", "jacobi", ["window=4", "warm=true"]).window == 4
    with pytest.raises(ConfigError, match="Did you mean 'jacobi'"):
        load("decoder", "jacobbi")
    with pytest.raises(ConfigError, match="Did you mean 'window'"):
        load("decoder", "jacobi", ["windw=4"])
    with pytest.raises(ConfigError, match="key=value"):
        load("decoder", "jacobi", ["window"])


@pytest.mark.parametrize(
    ("name", "option", "wanted"),
    [
        ("jacobi", "window=2.5", "a whole number"), ("jacobi", "window=true", "a whole number"),
        ("jacobi", "warm=yes please", "true or false"), ("jacobi", "agreement=.nan", "a finite number"),
        ("jacobi", "head=3", "a text"), ("early_exit", "layer=1.5", "a whole number"),
        ("early_exit_adaptive", "low_alpha=.nan", "a finite"), ("early_exit_adaptive", "high_alpha=.inf", "a finite"),
        ("autoregressive", "temperature=.nan", "a finite"), ("autoregressive", "temperature=warm", "a finite"),
        ("realtime", "beta=.nan", "a finite number"), ("realtime", "beta=.inf", "a finite number"),
        ("anytime", "deadline_ms=.nan", r"a number or \.inf"), ("anytime", "deadline_ms=null", r"a number or \.inf"),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_is_refused_with_its_key(name: str, option: str, wanted: str) -> None:
    key, _, value = option.partition("=")
    got = repr(yaml.safe_load(value))
    with pytest.raises(ConfigError, match=rf"decoder\.{key}: expected {wanted}.*, got {got}\. (Write|Put)"):
        load("decoder", name, [option])


def test_what_is_annotated_decides_and_unions_take_any_of_theirs() -> None:
    @dataclass
    class Thing:
        count: int
        share: float = 0.5
        most: Unbounded = 1.0
        name: str | None = None
        either: int | float | None = None
        free: Any = None

    for good in (
        {"share": 1}, {"most": float("inf")}, {"name": "x"}, {"either": 2.5}, {"either": None}, {"free": [object()]},
        {"share": np.float64(0.5)},
    ):  # fmt: skip
        check_arguments(Thing, {"count": 1, **good}, "thing")
    for bad in (
        {"count": 1.0}, {"count": None}, {"count": [1]}, {"share": float("inf")}, {"share": "1e-3"}, {"share": True},
        {"most": float("nan")}, {"name": 3}, {"either": "many"}, {"either": float("nan")},
    ):  # fmt: skip
        (key,) = bad
        with pytest.raises(ConfigError, match=rf"thing\.{key}: expected"):
            check_arguments(Thing, {"count": 1, **bad}, "thing")
    assert load("reuse", "flashvla").most == 1
    with pytest.raises(ConfigError, match=r"reuse\.angle_deg: expected a finite number, got nan"):
        load("reuse", "flashvla", ["angle_deg=.nan"])
    with pytest.raises(ConfigError, match=r"pruning\.keep"):
        load("pruning", "flashvla", ["keep=.nan"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"consistency": -1.0}, "consistency"), ({"consistency": float("inf")}, "consistency"),
     ({"anchor": float("nan")}, "anchor"), ({"tolerance": float("nan")}, "tolerance"),
     ({"tolerance": -0.1}, "tolerance")],
)  # fmt: skip
def test_weights_of_a_distillation_are_checked(changes: dict[str, float], key: str) -> None:
    from vla.training.recipes import DistillRecipe, HeadRecipe, TrainConfig

    def config(recipe: DistillRecipe) -> TrainConfig:
        head = HeadRecipe("tokens", distill=recipe)
        return TrainConfig("data", "out", None, {"bins": head}, init="bundle", freeze=True)  # type: ignore[arg-type]

    config(DistillRecipe(tolerance=float("inf"), anchor=0.0))
    with pytest.raises(ConfigError, match=rf"heads\.bins\.distill\.{key}: expected 0 or more"):
        config(DistillRecipe(**changes))


@pytest.mark.parametrize("name", embodiment_names())
def test_embodiments_load_and_find_their_model(name: str) -> None:
    robot = load_embodiment(name)
    assert robot.name
    if robot.robot_model:
        assert robot_model(robot).is_file()


def test_every_environment_has_an_embodiment() -> None:
    from ros_nodes.graph import robot_of
    from sim.environment import ENVIRONMENTS

    assert {name: robot_of(name) for name in ENVIRONMENTS} == {
        "tabletop": "tabletop", "robosuite": "libero", **{n: "libero" for n in ENVIRONMENTS if n.startswith("libero_")},
    }  # fmt: skip
    assert {robot_of(name) for name in ENVIRONMENTS} <= set(embodiment_names())
