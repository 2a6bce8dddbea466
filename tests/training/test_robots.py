"""Demonstrations of real robots, whose cameras and grippers have other names, train as those of the simulator do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config
from vla import configs
from vla.checkpoints import bundle as bundles
from vla.cli.main import main
from vla.data.lerobot import LeRobotDataset
from vla.data.lerobot_writer import DatasetSpec, merge, write_shard
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError
from vla.resources import load_embodiment
from vla.training.dataset import TrainingData
from vla.training.trainer import train

STEPS, CLOSES = 16, 6  # of an episode, and where its grippers close


def demonstrations(robot: Embodiment, folder: Path, episodes: int = 3) -> Path:
    """Joints that go from home to somewhere else; grippers open, and closed from CLOSES on."""
    rng, spec = np.random.default_rng(0), DatasetSpec.of(robot)
    shards = [folder / f"shard{number}" for number in range(episodes)]
    for shard in shards:
        way = np.linspace(0, 1, STEPS)[:, None] * rng.uniform(-0.2, 0.2, len(robot.joints))
        joints = np.array(robot.home) + way
        for place in robot.grippers:
            joint = robot.joints[place]
            joints[:, place] = np.where(np.arange(STEPS) < CLOSES, joint.upper, joint.lower)
        arrays = {key: rng.integers(0, 255, (STEPS, *spec.features[key].shape), dtype=np.uint8) for key in spec.cameras}
        state = np.stack([robot.joint_state_vector(row) for row in joints])
        write_shard(shard, spec, "pick it up", arrays | {"observation.state": state, "action": np.float32(joints)})
    merge(shards, folder / "data", spec, {"embodiment": robot.to_dict()})
    return folder / "data"


@pytest.mark.parametrize(("name", "lead"), [("so101", "front"), ("aloha", "cam_high"), ("panda", "agentview")])
def test_every_camera_of_a_robot_is_seen(name: str, lead: str, tmp_path: Path) -> None:
    robot = load_embodiment(name)
    data = demonstrations(robot, tmp_path)
    train(tiny_config(data, tmp_path / "out", steps=2, look_steps=1, val_every=1, checkpoint_every=2))
    made = bundles.load(tmp_path / "out" / "bundle")
    encoders = {camera.name: camera for camera in made.config.cameras}
    assert set(encoders) == set(robot.camera_names) and made.embodiment == robot
    assert [camera.name for camera in encoders.values() if camera.points] == [lead] == [made.config.cameras[0].name]


def test_the_line_of_the_readme_trains_on_an_so101(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = demonstrations(load_embodiment("so101"), tmp_path), tmp_path / "mine"
    quick = [
        "steps=2",
        "look_steps=1",
        "batch_size=2",
        "warmup_steps=1",
        "val_batches=1",
        "threads=1",
        "precision=fp32",
    ]
    assert main(["train", f"data={data}", f"out={out}", "device=cpu", *quick]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    start = next(row for row in rows if row["event"] == "start")
    assert start["cameras"] == {"front": 128, "wrist": 64} and start["validation_frames"] > 0


def test_cameras_may_be_given_by_hand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = demonstrations(load_embodiment("so101"), tmp_path)
    mine = "model.cameras=[{name:front,size:32,grid:4,channels:[8,16]}]"
    assert main(["train", f"data={data}", f"out={tmp_path / 'a'}", mine, "steps=1", "look_steps=0", "device=cpu"]) == 0
    assert [camera.name for camera in bundles.load(tmp_path / "a" / "bundle").config.cameras] == ["front"]
    wrong = "model.cameras=[{name:front,size:32,gird:4,channels:[8,16]}]"
    assert main(["train", f"data={data}", f"out={tmp_path / 'b'}", wrong, "device=cpu"]) == 2
    assert "model.cameras[0]: unknown key 'gird'" in capfd.readouterr().err


def test_cameras_that_cannot_be_are_named() -> None:
    recipe = configs.load("model", "small")
    assert [camera.name for camera in recipe.encoders(("wrist", "side"))] == ["side", "wrist"]
    slip = replace(recipe, cameras=(replace(recipe.cameras[0], name="frnt"), recipe.cameras[1]))
    with pytest.raises(ConfigError, match=r"model\.cameras: 'frnt' is no camera of the data\. Did you mean 'front'"):
        slip.encoders(("front", "wrist"))
    with pytest.raises(DataError, match="cameras of the data: expected at least one"):
        recipe.encoders(())


@pytest.mark.parametrize("name", ["panda", "aloha"])
def test_a_gripper_that_closes_is_where_to_look(name: str, tmp_path: Path) -> None:
    robot = load_embodiment(name)
    data = TrainingData(LeRobotDataset(demonstrations(robot, tmp_path, episodes=2)), horizon=8)
    assert data._keyframe_rows[0] == CLOSES - 1 and data._keyframe_rows[CLOSES] == STEPS - 1
