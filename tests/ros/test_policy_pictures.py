"""Pictures on their way to the policy, compressed or not: what is taken and refused, and where they are decoded."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import PIL.Image
import pytest

from policies.hold import HoldPolicy
from ros_nodes import messages as m
from ros_nodes.node import INSTRUCTION
from ros_nodes.policy_node import PolicyCore
from tests.ros.test_policy_core import AGENT, PERIOD, ROBOT, T0, WRIST, Driver
from vla.data.transforms import resize

ZIPPED = f"{AGENT}/compressed"


def picture(seed: int = 0, size: int = 128, kind: str = "png", mode: str = "RGB") -> bytes:
    """A file of noise, and thus a large one."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = PIL.Image.fromarray(pixels) if mode == "RGB" else PIL.Image.new(mode, (size, size))
    file.save(buffer, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return buffer.getvalue()


class Zipped(Driver):
    """Hears the cameras compressed."""

    def __init__(self) -> None:
        super().__init__(compressed=True)

    def frame(self, topic: str = AGENT, stamp_ns: int = 0, size: int = 128, encoding: str = "png", **file: Any) -> None:
        data = file.get("data", picture(size=size, kind=encoding))
        self.give(f"{topic}/compressed", m.CompressedImage(T0 + stamp_ns, "cam", file.get("format", encoding), data))


@pytest.mark.parametrize("size", [256, 320])
def test_larger_pictures_in_the_cameras_proportion_reach_the_policy_averaged(size: int) -> None:
    driver = Driver().ready()
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)
    driver.give(AGENT, m.Image(T0, "cam", "rgb8", pixels))
    driver.ask()
    assert np.array_equal(driver.policy.seen[0][0].images["agentview"], resize(pixels, 128, 128))
    assert driver.beat().level == m.OK


@pytest.mark.parametrize("encoding", ["bgr8", "rgba8", "mono8"])
def test_every_encoding_reaches_the_policy_as_rgb(encoding: str) -> None:
    driver = Driver().ready()
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128, m.CHANNELS[encoding]), np.uint8)
    driver.give(AGENT, m.decode(m.Image.type_name, bytes(m.encode(m.Image(T0, "cam", encoding, pixels)))))
    driver.ask()
    channels = {"bgr8": [2, 1, 0], "rgba8": [0, 1, 2], "mono8": [0, 0, 0]}[encoding]
    assert np.array_equal(driver.policy.seen[0][0].images["agentview"], pixels[..., channels])


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_compressed_pictures_reach_the_policy_as_they_were(kind: str) -> None:
    driver = Zipped()
    endpoints = {e.topic: e for e in driver.core.subscriptions}
    assert {ZIPPED, f"{WRIST}/compressed"} <= set(endpoints) and AGENT not in endpoints
    assert endpoints[ZIPPED].type_name == m.CompressedImage.type_name and not endpoints[ZIPPED].quality.reliable
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.joints()
    data = picture(3, kind=kind)
    driver.frame(AGENT, data=data, format=f"rgb8; {kind} compressed bgr8")
    driver.frame(WRIST, encoding=kind)
    driver.ask()
    images = driver.policy.seen[0][0].images
    assert images["agentview"].shape == (128, 128, 3) and images["agentview"].dtype == np.uint8
    np.testing.assert_array_equal(images["agentview"], np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
    if kind == "png":
        expected = np.random.default_rng(3).integers(0, 256, (128, 128, 3), np.uint8)
        np.testing.assert_array_equal(images["agentview"], expected)


def test_a_topic_named_compressed_is_heard_so_without_being_told() -> None:
    cameras = tuple(dataclasses.replace(c, topic=c.topic + "/compressed") for c in ROBOT.cameras)
    policy = HoldPolicy(dataclasses.replace(ROBOT, cameras=cameras))
    for compressed in (False, True):
        kinds = {e.topic: e.type_name for e in PolicyCore(policy, None, compressed=compressed).subscriptions}
        assert kinds[ZIPPED] == m.CompressedImage.type_name


BAD_FILES = {
    "no file": ({"data": b"nothing"}, "expected a whole png"),
    "another format": ({"format": "rvl"}, "format: expected jpeg or png"),
    "depth": ({"format": "16UC1; compressedDepth png"}, "format: expected jpeg or png"),
    "16 bits": ({"data": picture(mode="I;16")}, "expected 8 bits per colour, got I;16"),
    "not what it says": ({"data": picture(kind="jpeg")}, "expected a whole png"),
    "another size": ({"size": 64}, "expected 128x128, or larger in that proportion, got 64x64"),
    "cut short": ({"data": picture()[:9000]}, "expected a whole png, got 9000 bytes"),
    "cut short, jpeg": ({"data": picture(kind="jpeg")[:9000], "format": "jpeg"}, "expected a whole jpeg"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_compressed_picture_that_cannot_be_used_is_named_and_the_next_good_one_answers(fault: str) -> None:
    driver = Zipped()
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.joints()
    driver.frame(WRIST)
    values, words = BAD_FILES[fault]
    driver.frame(AGENT, **values)
    driver.ask()
    assert not driver.chunks
    beat = driver.beat()
    assert beat is not None and beat.level == m.WARN and words in beat.message and "agentview" in beat.message
    assert beat.values["queue"] == "1" and beat.values["failed"] == "0"
    driver.sensors(driver.time_ns)
    assert len(driver.chunks) == 1 and driver.beat().level == m.OK


def test_a_repeated_compressed_picture_is_known_by_its_fingerprint() -> None:
    driver = Zipped()
    prints = []
    for number, seed in enumerate((1, 1, 2)):
        driver.frame(AGENT, number * PERIOD, data=picture(seed))
        prints.append(driver.beat().values["picture/agentview"])
    assert prints[0] == prints[1] != prints[2]


def test_compressed_pictures_are_decoded_by_the_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Zipped()
    driver.run_jobs = False
    driver.give(INSTRUCTION.topic, m.Text("push"))
    monkeypatch.setattr(m.CompressedImage, "rgb", lambda self: pytest.fail("decoded on the thread that receives"))
    driver.sensors()
    driver.ask()
    assert driver.beat().values["queue"] == "1"
