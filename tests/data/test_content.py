"""What training data looks like, and what a robot shows that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from vla.data import content as c
from vla.data.transforms import resize
from vla.errors import DataError

NAMES = ("ee_x", "shoulder", "gripper")
CAMERAS = ("front", "wrist")
ROWS = 300
RNG = np.random.default_rng(0)
STATES = np.stack([RNG.uniform(0.3, 0.7, ROWS), RNG.uniform(-0.6, 0.9, ROWS), RNG.uniform(0.0, 0.08, ROWS)], axis=1)
STATES[0, 2] = 0.08  # the only episode begins open


def scene(camera: str, state: np.ndarray, symmetrical: bool = False) -> np.ndarray:
    """uint8[48, 64, 3]: a coloured room; a dot is where the arm is."""
    y, x = np.mgrid[0:1:48j, 0:1:64j]
    across = np.abs(x - 0.5) if symmetrical else x
    red, green, blue = (0.2 + 0.6 * y, 0.5 * across, 0.4 * across * y) if camera == "front" else (
        0.3 * across, 0.7 - 0.5 * y, 0.8 * (1 - across))  # fmt: skip
    picture = np.stack([red, green, blue], axis=-1)
    at = 0.5 if symmetrical else state[0]
    picture[(x - at) ** 2 + (y - 0.5) ** 2 < 0.02] = 0.9
    noise = np.random.default_rng(int(state[1] * 1e6) & 0xFFFF).normal(0, 0.03, picture.shape)
    return (255 * np.clip(picture + noise, 0, 1)).astype(np.uint8)


def made(symmetrical: bool = False) -> c.DataContent:
    dataset = SimpleNamespace(column=lambda name: STATES, episodes=[SimpleNamespace(start=0, stop=ROWS)])

    def pictures(camera: str, rows: np.ndarray) -> np.ndarray:
        return np.stack([scene(camera, STATES[row], symmetrical) for row in rows])

    return c.content_of(dataset, CAMERAS, NAMES, np.arange(ROWS), pictures)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def content() -> c.DataContent:
    """As a bundle gives it back."""
    return c.DataContent.from_dict(json.loads(json.dumps(made().to_dict())))


STATE = np.array([[0.62, 0.1, 0.05]])


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(
    ("change", "view"),
    [
        (lambda x: x[::-1, ::-1], "upside down"),
        (lambda x: x[:, ::-1], "mirrored left to right"),
        (lambda x: x[::-1], "mirrored top to bottom"),
        (lambda x: np.rot90(x), "turned a quarter to the left"),
        (lambda x: np.rot90(x, -1), "turned a quarter to the right"),
        (lambda x: x[..., ::-1], "red and blue swapped"),
        (lambda x: x[::-1, ::-1, ::-1], "upside down, red and blue swapped"),
    ],
)
def test_a_change_of_the_picture_is_named(
    content: c.DataContent, camera: str, change: Callable[[np.ndarray], np.ndarray], view: str
) -> None:
    seen = c.look(content, camera, change(scene(camera, STATE[0]))[None], STATE)
    assert (seen.kind, seen.explanations[0]) == (c.CHANGED, (camera, view))


def test_swapped_cameras_are_named(content: c.DataContent) -> None:
    for camera, other in (CAMERAS, CAMERAS[::-1]):
        assert c.look(content, camera, scene(other, STATE[0])[None], STATE).explanations == ((other, c.AS_TRAINED),)


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: (x * 0.6).astype(np.uint8), lambda x: resize(x, 24, 32), lambda x: x // 2 + 60]
)
def test_what_is_as_trained_is_not_accused(content: c.DataContent, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Darker, smaller, with less contrast: the same scene. A single picture may be unusual, 1 in 100 by its limits."""
    kinds = [
        c.look(content, camera, change(scene(camera, STATES[row]))[None], STATES[row : row + 1]).kind
        for row in range(0, ROWS, 15)
        for camera in CAMERAS
    ]
    assert c.CHANGED not in kinds and kinds.count(c.SAME) >= 0.9 * len(kinds)


def test_what_cannot_be_told_is_not_claimed() -> None:
    """Left and right are alike in this scene: a mirrored picture passes, and the answer says that it could not tell."""
    content = made(symmetrical=True)
    seen = c.look(content, "front", scene("front", STATE[0], True)[None, :, ::-1], STATE)
    assert seen.kind == c.SAME and ("front", "mirrored left to right") in seen.untold
    upside = c.look(content, "front", scene("front", STATE[0], True)[None, ::-1, ::-1], STATE)
    assert upside.kind == c.CHANGED and {view for _, view in upside.explanations} == {
        "upside down", "mirrored top to bottom",
    }  # fmt: skip


def test_another_scene_and_a_dark_one(content: c.DataContent) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (1, 48, 64, 3), np.uint8).repeat(1, 0)
    blocks = noise[:, :8, :8].repeat(6, 1).repeat(8, 2)
    assert c.look(content, "front", blocks, STATE).kind == c.UNLIKE
    assert c.look(content, "front", np.full((3, 48, 64, 3), 7, np.uint8), STATE).kind == c.BLANK


def test_a_camera_that_showed_nothing_has_no_print() -> None:
    dataset = SimpleNamespace(column=lambda name: STATES, episodes=[SimpleNamespace(start=0, stop=ROWS)])
    blank = c.content_of(dataset, CAMERAS, NAMES, np.arange(ROWS), lambda n, r: np.zeros((len(r), 8, 8, 3), np.uint8))  # type: ignore[arg-type]
    assert not blank.cameras and list(blank.state) == list(NAMES)


@pytest.mark.parametrize(
    ("state", "name", "words"),
    [
        ((0.5, np.degrees(0.5), 0.04), "shoulder", "degrees where radians"),
        ((500.0, 0.2, 0.04), "ee_x", "millimetres where metres"),
        ((-0.5, 0.2, 0.04), "ee_x", "the opposite sign"),
        ((0.5, 0.2 + np.pi / 2, 0.04), "shoulder", "off by a quarter turn"),
        ((0.5, 0.2, 0.9), "gripper", "counts from 0 to 1"),
        ((0.5, 0.2, 60.0), "gripper", "counts from 0 to 100"),
    ],
)
def test_a_state_outside_of_its_range_is_explained(
    content: c.DataContent, state: tuple[float, ...], name: str, words: str
) -> None:
    outside = [value for value in c.values(content, np.array([state])) if not value.inside]
    assert [value.name for value in outside] == [name] and any(words in cause for cause in outside[0].causes)


def test_a_gripper_at_the_other_end_where_all_else_has_just_begun(content: c.DataContent) -> None:
    start = STATES[0].copy()
    assert not any(value.flipped or not value.inside for value in c.values(content, start[None]))
    start[2] = 0.0
    assert [value.name for value in c.values(content, start[None]) if value.flipped] == ["gripper"]


def test_damaged_content_is_refused(content: c.DataContent) -> None:
    for damage in (
        lambda data: data["cameras"]["front"].pop("bounds"),
        lambda data: data["cameras"]["front"].update(weights="AAAA"),
        lambda data: data["state"].pop("gripper"),
        lambda data: data["state"]["gripper"].update(mean="x"),
    ):
        data = content.to_dict()
        damage(data)
        with pytest.raises(DataError, match="vla calibrate content"):
            c.DataContent.from_dict(data)
