"""What the pages tell a robot's owner to type: every launch and every `vla` line is taken as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ros_nodes import launching
from vla.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/how-to/on-your-robot.md", "docs/how-to/remote-policy.md")


def section(title: str) -> str:
    """Of the README."""
    ((text),) = re.findall(rf"^## {title}$(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return text


def typed(page: str) -> list[list[str]]:
    """The words of every line of the blocks without a language."""
    text = section("On your robot") if page == "README.md" else (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_vla_are_understood(page: str) -> None:
    found = [words[1:] for words in typed(page) if words[:1] == ["vla"]]
    assert found
    for words in found:
        chosen = main._chosen(words)
        assert chosen is not None, words
        main._parser(chosen).parse_args(words)


@pytest.mark.parametrize("page", PAGES[:2])
def test_launch_lines_name_the_python_with_torch_and_arguments_that_are_declared(page: str) -> None:
    found = [words[2:] for words in typed(page) if words[:2] == ["ros2", "launch"] and words[2].startswith("launch/")]
    assert found
    for path, *words in found:
        assert (ROOT / path).is_file()
        given = dict(word.split(":=", 1) for word in words)
        assert given["python"] == "$HOME/vla/bin/python", path
        launching.check(launching.LAUNCHES[Path(path).name.removesuffix(".launch.py")], given, launching.ROS_ONLY)


@pytest.mark.parametrize("page", PAGES[:2])
def test_what_is_built_is_there(page: str) -> None:
    """colcon looks no further below a package: each path must be one, and the action's type is a second."""
    ((*_, first, second),) = [words for words in typed(page) if words[:2] == ["colcon", "build"]]
    packages = [path.removeprefix("~/vla-stack").removeprefix("src/vla-stack").lstrip("/") for path in (first, second)]
    assert packages[0] == ""
    names = [ElementTree.parse(ROOT / folder / "package.xml").findtext("name") for folder in packages]
    assert names == ["vla_stack", "vla_interfaces"]
    assert (ROOT / packages[1] / "action" / "ExecuteInstruction.action").is_file()


def test_the_readme_names_every_command() -> None:
    listed = re.findall(r"^vla (\w+) ", section("The command line"), re.M)
    assert {command.path[0] for command in main.COMMANDS} == set(listed)
