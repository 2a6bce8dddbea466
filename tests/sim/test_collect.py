"""Collection: what is kept follows from the seeds alone, and survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.collect import CollectConfig, collect
from sim.control import make_expert
from sim.demonstrate import Noise, Perturbation, run_expert
from sim.environment import EVAL_SEED_START, make
from vla.data.lerobot import LeRobotDataset
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.types import ControlMode

EPISODES = 4


def config(out: Path, workers: int = 1, **changes: Any) -> CollectConfig:
    return CollectConfig(
        **{"out": str(out), "task": "push", "episodes": EPISODES, "workers": workers, "seed": 40} | changes
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("collected") / "one"
    report = collect(config(out), progress=False)
    assert report.episodes == EPISODES and report.attempts >= EPISODES
    return out


def test_data_set_is_complete(collected: Path) -> None:
    data = LeRobotDataset(collected)
    robot = load_embodiment("tabletop")
    assert len(data.episodes) == EPISODES and data.cameras == robot.camera_names
    assert data.embodiment() == robot
    assert data.column("action").shape == (len(data), robot.action_dim)
    assert data.column("observation.state").shape == (len(data), robot.state_dim)
    assert data.frame("wrist", len(data) - 1).shape == (128, 128, 3)
    facts = data.collection()
    assert [e["steps"] for e in facts["episodes"]] == [e.length for e in data.episodes]
    assert [e["instruction"] for e in facts["episodes"]] == [e.tasks[0] for e in data.episodes]
    assert len({e["seed"] for e in facts["episodes"]}) == EPISODES
    assert data.stats["action"].count == len(data)
    assert not collected.with_name("one.work").exists()


def test_pairs_ask_for_two_objects_in_the_same_scene(tmp_path: Path) -> None:
    collect(config(tmp_path / "pairs", task="pick_place", pairs=True, noise=Noise(fraction=0.0)), progress=False)
    dataset = LeRobotDataset(tmp_path / "pairs")
    facts = dataset.collection()["episodes"]
    assert [(fact["seed"], fact["options"]) for fact in facts] == [
        (40, {}),
        (40, {"swap": True}),
        (41, {}),
        (41, {"swap": True}),
    ]
    for first, second in ((0, 1), (2, 3)):
        pair = [dataset.episodes[i] for i in (first, second)]
        assert facts[first]["instruction"] != facts[second]["instruction"]
        pictures = [dataset.frame("agentview", episode.start).astype(int) for episode in pair]
        assert np.abs(pictures[0] - pictures[1]).max() <= 4  # the same scene, up to the codec
        ends = [np.asarray(dataset.column("observation.state"))[episode.start + 15, :2] for episode in pair]
        assert np.linalg.norm(ends[0] - ends[1]) > 0.03  # and the arm goes elsewhere


def test_two_workers_make_the_same_bytes(collected: Path, tmp_path: Path) -> None:
    collect(config(tmp_path / "two", workers=2), progress=False)
    assert content(tmp_path / "two") == content(collected)


def test_a_killed_run_continues_to_the_same_bytes(collected: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "sim.collect", "--task", "push", "--seed", "40", "--workers", "1"]
    command += ["--episodes", str(EPISODES), "--out", str(out)]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    finished = out.with_name("killed.work") / "episodes"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if finished.exists() and any(path.name[0] != "." for path in finished.iterdir()):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists(), "the data set must appear only when it is complete"
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.name[0] != "."}
    assert 1 <= len(before) < EPISODES
    (finished / ".000000099.left").mkdir()  # what a killed writer leaves behind
    kept: dict[str, int] = {}

    def watch(message: str, *_: object) -> None:
        kept.update({p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.name in before})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.collect.log.info", watch)
        collect(config(out), progress=False)
    assert kept == before, "finished episodes are not made again"
    assert content(out) == content(collected)


def test_a_finished_collection_is_left_alone(collected: Path) -> None:
    before = content(collected)
    assert collect(config(collected), progress=False).episodes == EPISODES
    assert content(collected) == before
    with pytest.raises(ConfigError, match="seed=40 there, 41 now"):
        collect(config(collected, seed=41), progress=False)


def test_refuses_foreign_folders_and_wrong_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="another folder"):
        collect(config(tmp_path / "mine"), progress=False)
    with pytest.raises(ConfigError, match="Did you mean 'stack'"):
        collect(config(tmp_path / "new", task="stak"), progress=False)
    with pytest.raises(ConfigError, match="Did you mean 'tabletop'"):
        collect(config(tmp_path / "new", env="tabeltop"), progress=False)
    with pytest.raises(ConfigError, match="for evaluation"):
        config(tmp_path / "new", seed=EVAL_SEED_START)
    with pytest.raises(ConfigError, match="at least 1"):
        config(tmp_path / "new", workers=0)


def test_an_unfinished_collection_of_another_kind_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "set.work"
    work.mkdir()
    (work / "config.json").write_text(json.dumps(config(tmp_path / "set", seed=7).identity()))
    with pytest.raises(ConfigError, match="seed=7 there, 40 now"):
        collect(config(tmp_path / "set"), progress=False)


def test_the_clean_action_is_recorded_and_the_pushed_one_executed() -> None:
    """With strong noise the labels stay the expert's, the path does not, and the expert still arrives."""
    environment = make("tabletop")
    expert = make_expert("tabletop", environment)
    noise = Noise(fraction=1.0, level_min=1.0, level_max=1.0, gap_steps=8.0)
    still = run_expert(environment, expert, 3, "pick_place", Noise(fraction=0.0), render=False)
    pushed = run_expert(environment, expert, 3, "pick_place", noise, render=False)
    environment.close()
    assert still is not None and pushed is not None
    assert not still[0]["perturbed"].any() and pushed[0]["perturbed"].any()
    first = int(np.argmax(pushed[0]["perturbed"]))
    np.testing.assert_array_equal(pushed[0]["action"][: first + 1], still[0]["action"][: first + 1])
    np.testing.assert_array_equal(
        pushed[0]["observation.state"][: first + 1], still[0]["observation.state"][: first + 1]
    )
    shorter = min(len(still[0]["action"]), len(pushed[0]["action"]))
    drift = pushed[0]["observation.state"][:shorter, :3] - still[0]["observation.state"][:shorter, :3]
    assert np.abs(drift).max() > 0.005


def test_perturbation_follows_the_seed_and_spares_gripper_and_rotation() -> None:
    robot = load_embodiment("tabletop")
    assert robot.control_mode is ControlMode.JOINT_POSITION
    action = np.array([0.01, 0, 0, 0, 0, 0.02, 1.0])
    runs = []
    for seed in (1, 1, 2):
        perturbation = Perturbation(Noise(fraction=1.0, gap_steps=3.0), robot, seed)
        runs.append(np.array([perturbation.apply(action)[0] for _ in range(200)]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    np.testing.assert_array_equal(runs[0][:, 3:], np.tile(action[3:], (200, 1)))
    limit = robot.max_tool_speed_m_s * robot.period_s
    assert np.linalg.norm(runs[0][:, :3], axis=1).max() <= limit + 1e-9
    np.testing.assert_array_equal(action, [0.01, 0, 0, 0, 0, 0.02, 1.0])
