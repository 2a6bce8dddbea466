"""Launch files, `vla launch`, and the declarations both are made of. None of this needs ROS."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ros_nodes import launching, messages, settings
from ros_nodes.graph import free_domain
from ros_nodes.node import SIM_STATUS
from ros_nodes.wire import Participant
from vla.cli import launch as cli
from vla.cli import main
from vla.errors import ConfigError
from vla.resources import BUNDLE_MARKER, bundle_path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "launch").glob("*.launch.py"))


class Fake:
    """An action or substitution of `launch`, as it was written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def perform(self, context: dict[str, str]) -> str:
        return context[self.args[0]]


@pytest.fixture
def launch_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, members in {
        "launch": ("LaunchDescription",),
        "launch.actions": ("DeclareLaunchArgument", "OpaqueFunction"),
        "launch.substitutions": ("LaunchConfiguration",),
        "launch_ros": (),
        "launch_ros.actions": ("LifecycleNode",),
    }.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (Fake,), {}))
        monkeypatch.setitem(sys.modules, name, module)


def described(path: Path) -> list[Fake]:
    """The actions of a launch file."""
    description = runpy.run_path(str(path))["generate_launch_description"]()
    return list(description.args[0])


def started(path: Path, **given: str) -> list[dict[str, Any]]:
    """What the LifecycleNodes of a launch file are made with, for these arguments."""
    actions = described(path)
    declared = [a for a in actions if type(a).__name__ == "DeclareLaunchArgument"]
    context = {a.args[0]: given.get(a.args[0], a.kwargs.get("default_value", "")) for a in declared}
    functions = [a.kwargs for a in actions if type(a).__name__ == "OpaqueFunction"]
    return [node.kwargs for f in functions for node in f["function"](context, *f["args"])]


# ---- launch files ----
def test_there_is_a_file_for_every_launch() -> None:
    assert [path.name.removesuffix(".launch.py") for path in FILES] == sorted(launching.LAUNCHES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.usefixtures("launch_modules")
def test_a_launch_file_declares_what_is_declared(path: Path) -> None:
    launch = launching.LAUNCHES[path.name.removesuffix(".launch.py")]
    declared = {a.args[0]: a.kwargs for a in described(path) if type(a).__name__ == "DeclareLaunchArgument"}
    names = {names.get(s.name, s.name) for node, names in launch.parts.items() for s in settings.NODES[node].settings}
    assert names <= set(declared) and {"params_file", "namespace", "python", "autostart", "log_level"} <= set(declared)
    for name, facts in declared.items():
        assert len(facts["description"]) > 8, name
        assert ("default_value" in facts) != (name in launch.required), name
        assert facts.get("default_value", "") in facts.get("choices", [facts.get("default_value", "")]), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.usefixtures("launch_modules")
def test_a_launch_file_starts_its_nodes(path: Path) -> None:
    launch = launching.LAUNCHES[path.name.removesuffix(".launch.py")]
    nodes = started(path, bundle="b", robot="r", namespace="left", params_file="", log_level="debug")
    assert [node["name"] for node in nodes] == [settings.NODES[part].name for part in launch.parts]
    for node, part in zip(nodes, launch.parts):
        assert node["arguments"] == ["-m", "ros_nodes.rclpy_shell", part] and node["executable"] == sys.executable
        assert node["namespace"] == "left" and node["ros_arguments"] == ["--log-level", "debug"]
        assert node["parameters"][0] == str(ROOT / "launch" / "params" / f"{part}.yaml")
        assert str(ROOT) in node["additional_env"]["PYTHONPATH"].split(os.pathsep)


@pytest.mark.usefixtures("launch_modules")
def test_only_arguments_that_were_given_become_parameters(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("vla_policy:\n  ros__parameters:\n    slop: 0.05\n    qos_overrides./joint_states.depth: 9\n")
    path = ROOT / "launch" / "robot.launch.py"
    given = {"decoder": "jacobi window=4", "sequential": "true", "lead": "3", "use_sim_time": "true"}
    policy, command = started(path, bundle="b", robot="r", params_file=str(mine), **given)
    assert policy["parameters"][1:] == [
        str(mine), {"policy": "b", "embodiment": "r", "decoder": "jacobi window=4", "use_sim_time": True},
    ]  # fmt: skip
    assert command["parameters"][2] == {"embodiment": "r", "sequential": True, "lead": 3, "use_sim_time": True}
    policy, _ = started(path, bundle="b", robot="r", autostart="false")
    assert policy["parameters"][1:] == [{"policy": "b", "embodiment": "r", "autostart": False}]
    (sim,) = started(ROOT / "launch" / "sim.launch.py")
    assert len(sim["parameters"]) == 1, "nothing was given"


@pytest.mark.usefixtures("launch_modules")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slop": "2"}, "slop: expected 0 to 1, got 2"),
        ({"lead": "1.5"}, "lead: expected a whole number, got '1.5'"),
        ({"deadman": "maybe"}, "deadman: expected true or false"),
        ({"bundle": ""}, "bundle: expected bundle folder"),
        ({"namespace": "left arm"}, "namespace: expected a name such as left"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(ROOT / "launch" / "robot.launch.py", **{"bundle": "b", "robot": "r", **given})
    with pytest.raises(ConfigError, match=message):
        words = {"bundle": "b", "robot": "r", **given}
        cli.read(launching.LAUNCHES["robot"], [f"{name}:={value}" for name, value in words.items()])


# ---- parameters ----
@pytest.mark.parametrize("node", settings.NODES)
def test_parameter_files_hold_the_defaults_of_all_that_is_declared(node: str) -> None:
    """But for what is asked for, and the robot, which is an argument of every launch."""
    found = launching.read_params(launching.params_dir() / f"{node}.yaml", node)
    declared = {s.name: s.default for s in settings.NODES[node].settings if not s.required and s.name != "embodiment"}
    assert found == {name: default or found[name] for name, default in declared.items()}
    assert not any(found[name] for name, default in declared.items() if not default)


def test_a_parameter_file_with_a_slip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, message in {
        "/**:\n  ros__parameters:\n    slopp: 0.1\n": "no parameter 'slopp'. Did you mean 'slop'",
        "vla_policy:\n  ros__parameters:\n    slop: 7\n": "slop: expected 0 to 1, got 7",
        "vla_policy:\n  slop: 7\n": "expected a ROS parameter file",
        "a: [": "expected a ROS parameter file",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            launching.read_params(path, "policy")
    path.write_text(
        "vla_command:\n  ros__parameters:\n    lead: 7\n/**/vla_policy:\n  ros__parameters:\n    slop: 0.3\n"
    )
    assert launching.read_params(path, "policy") == {"slop": 0.3}


@pytest.mark.parametrize(
    ("key", "namespace", "applies"),
    [
        ("vla_policy", "", True),
        ("vla_policy", "left", False),
        ("/left/vla_policy", "left", True),
        ("/left/vla_policy", "/left", True),
        ("/left/vla_policy", "right", False),
        ("/left/**", "left", True),
        ("/left/**", "right", None),
        ("/*/vla_policy", "left", True),
        ("/*/vla_policy", "a/b", False),
        ("/**/vla_policy", "a/b", True),
        ("left:\n vla_policy", "left", True),
        ("vla_policy_2", "", None),
    ],
)
def test_keys_of_a_parameter_file_are_read_as_ros_does(
    key: str, namespace: str, applies: bool | None, tmp_path: Path
) -> None:
    """None: another node's business, whatever it says."""
    path = tmp_path / "p.yaml"
    path.write_text(f"{key}:\n  ros__parameters:\n    slop: 0.3\n")
    assert launching.read_params(path, "policy", namespace) == ({"slop": 0.3} if applies else {})
    path.write_text(f"{key}:\n  ros__parameters:\n    slopp: 0.3\n")
    if applies is None:
        assert not launching.read_params(path, "policy", namespace)
    else:  # a slip is one, in the other arm's part too
        with pytest.raises(ConfigError, match="no parameter 'slopp'"):
            launching.read_params(path, "policy", namespace)


def test_what_a_parameter_file_says_to_a_shell_reaches_the_wheel_or_is_refused(tmp_path: Path) -> None:
    path, table = tmp_path / "p.yaml", launching.LAUNCHES["policy"]

    def words(line: str, **given: str) -> list[str]:
        path.write_text(f"/**:\n  ros__parameters:\n    {line}\n")
        return launching.wheel_command(table, "policy", {"bundle": "b", "params_file": str(path), **given})

    assert "--use-sim-time" in words("use_sim_time: true")
    assert "--use-sim-time" not in words("use_sim_time: true", use_sim_time="false")
    assert "--use-sim-time" in words("use_sim_time: false", use_sim_time="true")
    assert words("stats: s.json")[-2:] == ["--stats", "s.json"] and words("autostart: true")
    for line, name in {
        "autostart: false": "autostart",
        "qos_overrides./joint_states.subscription.depth: 9": "qos_overrides./joint_states.subscription.depth",
        "qos_overrides: {/joint_states: {subscription: {depth: 9}}}": "qos_overrides",
    }.items():
        with pytest.raises(ConfigError, match=f"{re.escape(name)}: expected ROS 2 .rclpy., got the DDS wheel"):
            words(line)
    with pytest.raises(ConfigError, match="use_sim_time: expected true or false"):
        words("use_sim_time: 3")
    left = {"bundle": "b", "params_file": str(path), "namespace": "left"}
    path.write_text("/left/vla_policy:\n  ros__parameters:\n    slop: 0.3\n")
    told = launching.wheel_command(table, "policy", left)
    assert told[told.index("--slop") + 1] == "0.3" and told[told.index("--namespace") + 1] == "left"
    told = launching.wheel_command(table, "policy", {**left, "namespace": "right"})
    assert "0.3" not in told and "right" in told


@pytest.mark.parametrize("node", settings.NODES)
def test_command_line_and_parameters_say_the_same(node: str) -> None:
    """The defaults, and a value of every kind, read from words and from parameters."""
    table = settings.NODES[node].settings
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, table)
    examples = {"flag": True, "int": 3, "float": 0.5, "text": "one", "words": "name key=1", "list": "/a /b"}
    required = {s.name: "one" for s in table if s.required}
    every = {s.name: s.choices[-1] if s.choices else min(max(s.low, examples[s.kind]), s.high)
             if s.kind in ("int", "float") else examples[s.kind] for s in table}  # fmt: skip
    for values in (required, every):
        words = [word for s in table if s.name in values for word in s.words(values[s.name])]
        assert parser.parse_args(words) == settings.options(table, values)
    with pytest.raises(ConfigError, match="is no setting"):
        settings.options(table, {"nothing": 1})


def test_settings_are_described_and_bounded() -> None:
    for node in settings.NODES.values():
        assert len({s.name for s in node.settings}) == len(node.settings)
        for s in node.settings:
            assert s.kind in settings.KINDS and len(s.help.split()) >= 3, s.name
            if s.kind in ("int", "float"):
                assert s.low <= s.default <= s.high and s.high < float("inf") and s.low > -float("inf"), s.name
            assert s.read(s.default) == s.default or s.kind in ("words", "list"), s.name


def test_a_launch_file_needs_little_of_its_python() -> None:
    """ROS's own Python has numpy and yaml, not torch, rosbags or cyclonedds."""
    absent = ("torch", "rosbags", "cyclonedds", "mujoco", "scipy", "hydra", "rclpy", "launch")
    code = f"import sys, ros_nodes.launching; print([n for n in {absent!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- vla launch ----
def launch(domain: int, *words: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vla.cli.main", "launch", *words, f"domain:={domain}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_until_it_is_told_to_end(number: signal.Signals) -> None:
    domain = free_domain()
    process = launch(domain, "sim", "env:=tabletop")
    try:
        with Participant("tester", domain=domain) as tester:
            heard = threading.Event()
            tester.subscribe(SIM_STATUS.topic, SIM_STATUS.type_name, SIM_STATUS.quality, lambda *_: heard.set())
            tester.start()
            assert heard.wait(120)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, errors) == (0, "", "")


def test_a_node_that_fails_ends_the_launch(tmp_path: Path) -> None:
    shutil.copy(bundle_path("tabletop") / BUNDLE_MARKER, tmp_path)  # without its weights
    process = launch(free_domain(), "robot", f"bundle:={tmp_path}", "robot:=tabletop")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert str(tmp_path) in errors and "policy ended by itself with code 1" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bundle:=nowhere", "robot:=tabletop"), "bundle 'nowhere': no such folder and no shipped bundle"),
        (("bundle:=hold", "robot:=nowhere"), "embodiment: 'nowhere' is unknown"),
        (("bundle:=ws://nowhere:1", "robot:=/nowhere.yaml"), "embodiment: expected a readable file"),
        (("bundle:=tests", "robot:=tabletop"), "bundle.json: expected a bundle's description"),
        (("bundle:=tabletop", "robot:=panda"), "robot 'panda' and policy 'tabletop': 7 difference(s)"),
        (("bundle:=hold", "robot:=panda", "output:=velocities"), "output_topic: expected the topic"),
        (("bundle:=hold", "robot:=panda", "output:=velocities", "output_topic:=/v"), "the driver stops by itself"),
        (
            ("bundle:=hold", "robot:=panda", "output:=velocities", "output_topic:=/v", "driver_timeout:=0.04"),
            "timeout_s: expected above the period of 0.05 s",
        ),
        (("bundle:=hold", "robot:=panda", "domain:=999"), "domain: expected a number in 0..232"),
    ],
)
def test_what_is_not_there_is_one_message_and_starts_nothing(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.Processes, "run", lambda self: pytest.fail("started"))
    assert main.main(["launch", "robot", *words]) == main.EXIT_ERROR
    assert message in capsys.readouterr().err


def test_a_node_is_started_again_when_asked(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"open({str(count)!r}, 'a').write('x')"
    processes = cli.Processes({"node": [sys.executable, "-c", script]}, respawn=True)
    threading.Timer(cli.RESPAWN_DELAY_S + 1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert processes.run() == 0 and len(count.read_text()) >= 2


def test_arguments_of_ros_alone_are_refused_by_name() -> None:
    table = launching.LAUNCHES["policy"]
    assert cli.read(table, ["bundle:=b", "autostart:=true", "log_level:=info"]) == {"bundle": "b"}
    with pytest.raises(ConfigError, match=r"autostart: expected ROS 2 \(rclpy\), got the DDS wheel"):
        cli.read(table, ["bundle:=b", "autostart:=false"])
    with pytest.raises(ConfigError, match=r"no argument 'bundel'\. Did you mean 'bundle'"):
        cli.read(table, ["bundel:=b"])
    with pytest.raises(ConfigError, match="expected name:=value"):
        cli.read(table, ["bundle=b"])


@pytest.mark.parametrize("name", launching.LAUNCHES)
def test_arguments_are_shown(name: str) -> None:
    text = cli.described(launching.LAUNCHES[name])
    for argument in launching.settings_of(launching.LAUNCHES[name]):
        assert f"'{argument}':" in text


# ---- the ROS package ----
def test_package_manifest_names_what_the_nodes_speak() -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    depends = {element.text for element in package.iter("exec_depend")}
    spoken = {name.split("/")[0] for name in messages.TYPE_NAMES} - {"rmw_dds_common"}  # the graph is rclpy's business
    shells = [path.read_text() for path in (ROOT / "ros_nodes").glob("rclpy_*.py")]
    imported = {name for text in shells for name in re.findall(r"^(?:from|import) (rcl\w+|\w+_msgs)", text, re.M)}
    assert {"rclpy", "rcl_interfaces", "action_msgs"} <= imported
    assert spoken | imported | {"std_srvs", "control_msgs", "launch_ros", "lifecycle_msgs"} <= depends
    assert package.findtext("export/build_type") == "ament_python" and package.findtext("name") == "vla_stack"


def test_what_colcon_builds_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    facts: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: facts.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    modules = {path.parent for folder in ("vla", "policies", "sim", "ros_nodes") for path in Path(folder).rglob("*.py")}
    assert {".".join(folder.parts) for folder in modules} | {"vla._configs"} == set(facts["packages"])
    shipped = {f"configs/{name}" for name in facts["package_data"]["vla._configs"]}
    assert shipped == {str(path) for path in Path("configs").rglob("*") if path.is_file()}
    assert "pretrained/tabletop/bundle.json" in facts["package_data"]["policies"]
    data = {name: files for name, files in facts["data_files"]}
    assert [Path(name).name for name in data["share/vla_stack/launch"]] == [path.name for path in FILES]
    assert len(data["share/vla_stack/launch/params"]) == len(settings.NODES)
    assert (ROOT / "resource" / facts["name"]).read_bytes() == b""
    source = (ROOT / "ros_nodes" / "rclpy_shell.py").read_text()
    for entry in facts["entry_points"]["console_scripts"]:
        assert f"{entry.split(':')[1]}" in source


def test_an_environment_that_is_none_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["launch", "sim", "env:=tabeltop"]) == main.EXIT_ERROR
    assert "Did you mean 'tabletop'" in capsys.readouterr().err


def test_what_a_parameter_file_may_say_is_left_to_the_node() -> None:
    cli.look({"robot": "panda", "bundle": "hold", "output": "velocities", "params_file": "mine.yaml"})
