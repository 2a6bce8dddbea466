"""Decoded frame stores, image resizing, and windows over episodes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vla.data.frames import FrameStore
from vla.data.lerobot import LeRobotDataset
from vla.data.lerobot_writer import DatasetSpec, Feature, merge, write_shard
from vla.data.transforms import resize
from vla.data.window import Windows
from vla.embodiment import Camera, Embodiment
from vla.errors import DataError
from vla.types import ControlMode

LENGTHS = (6, 9)


def arm(action_space: str = "ee_delta") -> Embodiment:
    return Embodiment(
        name="testarm",
        rate_hz=20,
        action_space=action_space,
        action_names=("dx", "gripper"),
        action_units=("m", "1"),
        state_names=("x",),
        rotation_format="none",
        gripper_open=1,
        control_mode=ControlMode.JOINT_POSITION,
        cameras=(Camera("front", 64, 64),),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    root = tmp_path_factory.mktemp("set")
    spec = DatasetSpec(
        20,
        {
            "observation.images.front": Feature("video", (64, 64, 3)),
            "action": Feature("float32", (2,)),
            "perturbed": Feature("bool", (1,)),
        },
        "testarm",
    )
    for number, length in enumerate(LENGTHS):
        frames = np.zeros((length, 64, 64, 3), np.uint8)
        frames[...] = (20 * np.arange(length))[:, None, None, None]
        write_shard(
            root / str(number),
            spec,
            "go",
            {
                "observation.images.front": frames,
                "action": np.stack([np.arange(length) + 1.0, np.full(length, 1 - 2 * number)], 1),
                "perturbed": (np.arange(length) == 3)[:, None],
            },
        )
    merge([root / "0", root / "1"], root / "out", spec)
    return LeRobotDataset(root / "out")


def test_store_holds_the_resized_frames(dataset: LeRobotDataset, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = FrameStore(
        dataset, {"front": (16, 32)}, tmp_path, on_progress=lambda done, total: seen.append((done, total))
    )
    decoded = np.stack(list(dataset.frames("front", 0, len(dataset))))
    np.testing.assert_array_equal(store["front"], resize(decoded, 16, 32))
    assert seen[-1] == (len(dataset), len(dataset))
    assert not store["front"].flags.writeable
    again = FrameStore(dataset, {"front": (16, 32)}, tmp_path, on_progress=lambda *_: pytest.fail("decoded twice"))
    np.testing.assert_array_equal(again["front"], store["front"])
    assert [path.name for path in store.folder.iterdir()] == ["front_16x32.npy"]


def reference_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat every pixel until both sizes divide, then average whole blocks: the definition of an area average."""
    rows, columns, _ = image.shape
    down, across = math.lcm(rows, height), math.lcm(columns, width)
    fine = image.repeat(down // rows, 0).repeat(across // columns, 1).astype(np.int64)
    total = fine.reshape(height, down // height, width, across // width, 3).sum((1, 3))
    area = (down // height) * (across // width)
    return ((2 * total + area) // (2 * area)).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (6, 50), (128, 128), (1, 1), (160, 144)])
def test_resize_is_the_exact_area_average(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    image[:8] = 255
    np.testing.assert_array_equal(resize(image, *size), reference_resize(image, *size))
    batch = np.stack([image, image[::-1]])
    np.testing.assert_array_equal(resize(batch, *size)[1], resize(np.ascontiguousarray(image[::-1]), *size))


def test_resize_of_large_images_stays_exact() -> None:
    image = np.full((512, 640, 3), 255, np.uint8)
    image[::2] = 254
    np.testing.assert_array_equal(resize(image, 96, 128), reference_resize(image, 96, 128))
    with pytest.raises(DataError, match="uint8"):
        resize(np.zeros((4, 4, 3)), 2, 2)


def test_rows_stay_inside_the_episode(dataset: LeRobotDataset) -> None:
    rows, valid = Windows(dataset, arm()).rows(np.array([0, 5, 6, 14]), (-2, 0, 1))
    np.testing.assert_array_equal(rows, [[0, 0, 1], [3, 5, 5], [6, 6, 7], [12, 14, 14]])
    np.testing.assert_array_equal(
        valid, [[False, True, True], [True, True, False], [False, True, True], [True, True, False]]
    )


def test_after_the_end_the_arm_stays(dataset: LeRobotDataset) -> None:
    actions, valid = Windows(dataset, arm()).actions(np.array([4, 13]), 4)
    np.testing.assert_array_equal(actions[0], [[5, 1], [6, 1], [0, 1], [0, 1]])  # deltas stop, the gripper keeps
    np.testing.assert_array_equal(actions[1], [[8, -1], [9, -1], [0, -1], [0, -1]])
    np.testing.assert_array_equal(valid, [[True, True, False, False]] * 2)
    absolute, _ = Windows(dataset, arm("joint_position")).actions(np.array([4]), 4)
    np.testing.assert_array_equal(absolute[0], [[5, 1], [6, 1], [6, 1], [6, 1]])


def test_undisturbed_ends_after_a_perturbed_step(dataset: LeRobotDataset) -> None:
    """Step 3 of each episode executed something else: its own label is right, the ones after it are not."""
    known = Windows(dataset, arm()).undisturbed(np.array([2, 3, 4]), 4)
    np.testing.assert_array_equal(known, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_windows_refuse_another_embodiment(dataset: LeRobotDataset) -> None:
    other = Embodiment.from_dict(
        arm().to_dict() | {"action_names": ["dx", "dy", "gripper"], "action_units": ["m", "m", "1"]}
    )
    with pytest.raises(DataError, match="embodiment that the data was collected with"):
        Windows(dataset, other)
