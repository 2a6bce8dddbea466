"""The recorder: what came over the topics while an episode ran, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vla.cli.recorder import Recorder


def picture(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def recorded(tmp_path: Path) -> Recorder:
    recorder = Recorder(("agentview", "wrist"), tmp_path)
    recorder.on_image("agentview", 1, picture(1))  # before the run
    recorder.begin(0)
    recorder.on_image("agentview", 5, picture(5))  # on its way while the scene was reset
    for stamp in (10, 20, 30):
        recorder.on_image("agentview", stamp, picture(stamp))
        recorder.on_image("wrist", stamp + 1, picture(stamp + 100))
    recorder.end("do it", True, 10, 30)
    recorder.on_image("agentview", 40, picture(40))  # after it
    return recorder


def test_film_shows_the_episode_with_its_outcome_at_the_end(tmp_path: Path) -> None:
    shots = list(recorded(tmp_path).shots(total=4, fps=20))
    assert [int(shot.views[0][0, 0, 0]) for shot in shots[:3]] == [10, 20, 30]
    # The second view is the newest at that time, never one from the future (but for the first).
    assert [int(shot.views[1][0, 0, 0]) for shot in shots[:3]] == [110, 110, 120]
    assert [shot.success for shot in shots[:3]] == [None, None, True]
    assert len(shots) == 3 + 15 and all(shot.success for shot in shots[3:])
    assert shots[0].instruction == "do it" and shots[0].headline == "episode 1 of 4"


def test_an_episode_broken_off_has_no_outcome(tmp_path: Path) -> None:
    recorder = Recorder(("agentview",), tmp_path)
    recorder.begin(0)
    recorder.on_image("agentview", 10, picture(1))
    recorder.end("do it", None, 0, None)
    assert [shot.success for shot in recorder.shots(1, 20)] == [None]


def test_pictures_for_the_trace_are_jpegs_with_their_stamps(tmp_path: Path) -> None:
    found = list(recorded(tmp_path).pictures(every=2))
    assert [(camera, stamp) for camera, stamp, _ in found] == [
        ("agentview", 5), ("agentview", 20), ("wrist", 11), ("wrist", 31)
    ]  # fmt: skip
    assert abs(int(np.asarray(Image.open(io.BytesIO(found[1][2])))[0, 0, 0]) - 20) <= 2


def test_frames_of_another_size_are_counted_not_fatal(tmp_path: Path) -> None:
    recorder = Recorder(("agentview",), tmp_path)
    recorder.begin(0)
    recorder.on_image("agentview", 1, picture(1))
    recorder.on_image("agentview", 2, picture(1, size=4))
    assert recorder.refused == 1 and recorder.frames == 1


def test_scratch_files_go_away(tmp_path: Path) -> None:
    recorder = recorded(tmp_path)
    assert list(tmp_path.iterdir())
    recorder.close()
    assert not list(tmp_path.iterdir())
