"""The data set format: what is written is read back, what `lerobot` wrote is read, what is broken is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from vla.data import video
from vla.data.lerobot import LeRobotDataset
from vla.data.lerobot_writer import DatasetSpec, Feature, merge, write_shard
from vla.errors import ConfigError, DataError, StatisticsError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_v3"  # written by the lerobot package 0.4.4
LENGTHS = (7, 12, 5, 9)
CAMERA = "observation.images.front"


def spec(codec: str = "h264", **limits: float) -> DatasetSpec:
    features = {
        CAMERA: Feature("video", (64, 80, 3), ("height", "width", "channels")),
        "observation.state": Feature("float32", (3,), ("a", "b", "c")),
        "action": Feature("float32", (2,), ("x", "gripper")),
        "perturbed": Feature("bool", (1,)),
    }
    return DatasetSpec(20, features, "testarm", codec, **limits)  # type: ignore[arg-type]


def episode(number: int) -> dict[str, np.ndarray]:
    """Every frame is recognisable: a bright square that moves, on a background that tells the episode."""
    rng = np.random.default_rng(number)
    length = LENGTHS[number]
    frames = np.full((length, 64, 80, 3), (40 * number + 20, 90, 160), np.uint8)
    for t in range(length):
        frames[t, 8 : 8 + 16, 5 * t : 5 * t + 16] = (240, 230, 20)
    return {
        CAMERA: frames,
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "perturbed": rng.random((length, 1)) < 0.5,
    }


def write(folder: Path, out: Path, made: DatasetSpec) -> list[dict[str, np.ndarray]]:
    episodes = [episode(number) for number in range(len(LENGTHS))]
    for number, arrays in enumerate(episodes):
        write_shard(folder / str(number), made, f"task {number % 2}", arrays, {"seed": number})
    merge([folder / str(number) for number in range(len(LENGTHS))], out, made, {"extra": {"hello": 1}})
    return episodes


@pytest.fixture
def dataset(tmp_path: Path) -> LeRobotDataset:
    write(tmp_path / "shards", tmp_path / "set", spec())
    return LeRobotDataset(tmp_path / "set")


@pytest.mark.parametrize("codec", ["h264", "h264_420", "av1"])
def test_round_trip(tmp_path: Path, codec: str) -> None:
    episodes = write(tmp_path / "shards", tmp_path / "set", spec(codec))
    read = LeRobotDataset(tmp_path / "set")
    assert len(read) == sum(LENGTHS) and read.fps == 20 and read.cameras == ("front",)
    assert read.tasks == ("task 0", "task 1")
    assert [e.length for e in read.episodes] == list(LENGTHS)
    for key in ("observation.state", "action"):
        np.testing.assert_array_equal(read.column(key), np.concatenate([e[key] for e in episodes]))
    np.testing.assert_array_equal(read.column("perturbed"), np.concatenate([e["perturbed"] for e in episodes])[:, 0])
    assert [read.instruction(i) for i in (0, 6, 7, 32)] == ["task 0", "task 0", "task 1", "task 1"]
    frames = np.stack(list(read.frames("front", 0, len(read)))).astype(int)
    error = np.abs(frames - np.concatenate([e[CAMERA] for e in episodes]))
    assert error.mean() < (1.0 if codec == "h264" else 4.0)
    assert json.loads((read.path / "meta/extra.json").read_text()) == {"hello": 1}


@pytest.mark.skipif(
    not hasattr(os, "sched_getparam") or os.geteuid() != 0, reason="only root's encoder would become real-time"
)
@pytest.mark.parametrize("codec", video.CODECS)
def test_encoding_takes_no_priority_over_what_controls_an_arm(codec: str, tmp_path: Path) -> None:
    """Root's AV1 encoder would."""

    def priorities() -> set[int]:
        found = set()
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                found.add(os.sched_getparam(int(task.name)).sched_priority)
        return found

    before, during = priorities(), set[int]()

    def frames() -> Iterator[np.ndarray]:
        for _ in range(3):
            yield np.zeros((64, 64, 3), np.uint8)
            during.update(priorities())

    video.encode(tmp_path / "film.mp4", frames(), 20, video.codec(codec))
    assert during | priorities() <= before


def test_random_access_equals_sequential(dataset: LeRobotDataset) -> None:
    sequential = list(dataset.frames("front", 0, len(dataset)))
    for index in (0, 6, 7, 18, 19, 31, 32):
        np.testing.assert_array_equal(dataset.frame("front", index), sequential[index])


def test_files_split_at_their_size_limit(tmp_path: Path) -> None:
    write(tmp_path / "a", tmp_path / "one", spec())
    write(tmp_path / "b", tmp_path / "many", spec(data_file_mb=0.0005, video_file_mb=0.001, chunk_files=2))
    one, many = LeRobotDataset(tmp_path / "one"), LeRobotDataset(tmp_path / "many")
    assert {e.data_file.relative_to(many.path).as_posix() for e in many.episodes} >= {
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    }
    assert len({e.videos[CAMERA][0] for e in many.episodes}) > 1
    np.testing.assert_array_equal(one.column("action"), many.column("action"))
    for a, b in zip(one.frames("front", 0, len(one)), many.frames("front", 0, len(many)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reads_what_the_lerobot_package_wrote() -> None:
    """AV1, two video files, task texts as a pandas index, quantiles. Frame t of episode e: (40 e + 20, 2 x, 12 t)."""
    read = LeRobotDataset(FIXTURE)
    assert [e.length for e in read.episodes] == [12, 9, 14, 8] and read.fps == 10
    assert read.tasks == ("push the red block", "open the drawer", "wave")
    assert [read.instruction(i) for i in (0, 12, 34, 35)] == [
        "push the red block",
        "open the drawer",
        "push the red block",
        "wave",
    ]
    assert len({e.videos["observation.images.top"][0] for e in read.episodes}) == 2
    expected = [(e, t) for e, n in enumerate((12, 9, 14, 8)) for t in range(n)]
    np.testing.assert_array_equal(read.column("observation.state")[:, :2], np.float32(expected))
    assert read.column("next.reward").shape == (43,)
    for index, frame in enumerate(read.frames("top", 0, len(read))):
        number, t = expected[index]
        assert frame.shape == (64, 96, 3)
        assert abs(frame[..., 0].mean() - (40 * number + 20)) < 3
        assert abs(frame[..., 2].mean() - 12 * t) < 5
    np.testing.assert_array_equal(read.frame("top", 40), list(read.frames("top", 35, 43))[5])
    np.testing.assert_allclose(read.stats["action"].mean, read.column("action").mean(0), atol=1e-5)
    assert read.stats["observation.images.top"].mean.shape == (3, 1, 1)


def test_layout_is_what_the_lerobot_package_reads(dataset: LeRobotDataset) -> None:
    """Same files, columns and column types as in the fixture that the package wrote."""
    theirs, ours = FIXTURE, dataset.path

    def columns(path: Path) -> dict[str, str]:
        kinds = {field.name.replace("front", "top"): str(field.type) for field in pq.read_schema(path)}
        # lengths of vectors are the data's, statistics of integers may be floats, and both kinds of text are text
        plain = {name: re.sub(r"\[\d+\]|^large_", "", kind) for name, kind in kinds.items()}
        return {name: "statistic" if name.startswith("stats/") else kind for name, kind in plain.items()}

    for name in ("meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        expected = {key: kind for key, kind in columns(theirs / name).items() if "next.reward" not in key}
        got = columns(ours / name)
        assert {key: got.get(key) for key in expected} == expected
    info, mine = json.loads((theirs / "meta/info.json").read_text()), json.loads((ours / "meta/info.json").read_text())
    assert set(info) <= set(mine)
    assert info["data_path"] == mine["data_path"] and info["video_path"] == mine["video_path"]
    assert set(info["features"]["observation.images.top"]["info"]) == set(mine["features"][CAMERA]["info"])
    stats = json.loads((theirs / "meta/stats.json").read_text())
    assert set(stats["action"]) == set(dataset.stats.plain["action"])
    assert np.shape(stats["observation.images.top"]["q99"]) == np.shape(dataset.stats.plain[CAMERA]["q99"])


def truncate(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("broken", "read"),
    [
        ("data/chunk-000/file-000.parquet", lambda d: d.column("action")),
        ("meta/episodes/chunk-000/file-000.parquet", lambda d: d.episodes),
        ("meta/tasks.parquet", lambda d: d.tasks),
        (f"videos/{CAMERA}/chunk-000/file-000.mp4", lambda d: list(d.frames("front", 0, len(d)))),
        ("meta/info.json", lambda d: d),
    ],
)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_broken_files_are_named(dataset: LeRobotDataset, broken: str, read: object, how: str) -> None:
    path = dataset.path / broken
    truncate(path) if how == "truncated" else path.unlink()
    with pytest.raises(DataError) as caught:
        read(LeRobotDataset(dataset.path))  # type: ignore[operator]
    name = "meta/episodes" if how == "missing" and "episodes" in broken else broken
    assert name in str(caught.value) and "expected" in str(caught.value) and "again" in str(caught.value)


def test_a_video_that_ends_early_is_an_error(dataset: LeRobotDataset, tmp_path: Path) -> None:
    path = dataset.path / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    shorter = list(dataset.frames("front", 0, 20))
    video.encode(path, shorter, 20, video.codec("h264"))
    assert len(list(LeRobotDataset(dataset.path).frames("front", 0, 20))) == 20
    with pytest.raises(DataError, match="20 frames, 33 expected"):
        list(LeRobotDataset(dataset.path).frames("front", 0, len(dataset)))


def test_statistics(dataset: LeRobotDataset, tmp_path: Path) -> None:
    actions = dataset.column("action").astype(float)
    stats = dataset.stats["action"]
    np.testing.assert_allclose(stats.mean, actions.mean(0))
    np.testing.assert_allclose(stats.std, actions.std(0))
    np.testing.assert_allclose(stats.q01, np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(stats.q99, np.quantile(actions, 0.99, axis=0))
    assert stats.count == len(actions)
    pixels = np.concatenate([episode(i)[CAMERA] for i in range(len(LENGTHS))]).reshape(-1, 3) / 255.0
    image = dataset.stats[CAMERA]
    np.testing.assert_allclose(image.mean.ravel(), pixels.mean(0), atol=1e-9)
    np.testing.assert_allclose(image.std.ravel(), pixels.std(0), atol=1e-9)
    np.testing.assert_allclose(image.q50.ravel(), np.quantile(pixels, 0.5, axis=0), atol=1 / 255)


def test_missing_statistics_are_an_error(dataset: LeRobotDataset) -> None:
    with pytest.raises(StatisticsError, match="Did you mean 'action'"):
        dataset.stats["actions"]
    path = dataset.path / "meta/stats.json"
    plain = json.loads(path.read_text())
    del plain["action"]["q01"]
    path.write_text(json.dumps(plain))
    with pytest.raises(StatisticsError, match=r"\['q01'\] missing"):
        LeRobotDataset(dataset.path).stats["action"]
    path.unlink()
    with pytest.raises(StatisticsError, match="no such file"):
        LeRobotDataset(dataset.path)


def test_refuses_other_versions_and_folders(dataset: LeRobotDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        LeRobotDataset(tmp_path / "nowhere")
    path = dataset.path / "meta/info.json"
    path.write_text(path.read_text().replace('"v3.0"', '"v2.1"'))
    with pytest.raises(DataError, match="Convert it"):
        LeRobotDataset(dataset.path)


def test_wrong_names_offer_the_nearest(dataset: LeRobotDataset) -> None:
    with pytest.raises(DataError, match="Did you mean 'front'"):
        dataset.frame("fornt", 0)
    with pytest.raises(DataError, match="Did you mean 'action'"):
        dataset.column("actoin")
    with pytest.raises(ConfigError, match="Did you mean 'h264'"):
        video.codec("h265")


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    arrays = episode(0)
    with pytest.raises(DataError, match="equal lengths"):
        write_shard(tmp_path / "s", spec(), "t", arrays | {"action": arrays["action"][:-1]})
    with pytest.raises(DataError, match="finite"):
        write_shard(tmp_path / "s", spec(), "t", arrays | {"action": np.full_like(arrays["action"], np.nan)})
    with pytest.raises(DataError, match="exactly the features"):
        write_shard(tmp_path / "s", spec(), "t", {"action": arrays["action"]})
    assert list(tmp_path.iterdir()) == []
    write_shard(tmp_path / "s", spec(), "t", arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    truncate(tmp_path / "s" / "arrays.npz")
    with pytest.raises(DataError, match="a complete episode"):
        merge([tmp_path / "s"], tmp_path / "out", spec())
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_fingerprint_follows_the_content(dataset: LeRobotDataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    assert LeRobotDataset(copy).fingerprint == dataset.fingerprint
    path = copy / "meta/tasks.parquet"
    path.write_bytes(path.read_bytes() + b"\0")
    assert LeRobotDataset(copy).fingerprint != dataset.fingerprint
