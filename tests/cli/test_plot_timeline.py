"""The timeline: what is drawn is what the trace says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from vla.cli import main
from vla.cli.plot_timeline import COLOURS, draw
from vla.cli.plots import BAD, GREY
from vla.embodiment import Camera, Embodiment
from vla.errors import DataError
from vla.runtime.gate import Decision, Reason, Verdict
from vla.runtime.scheduler import DueAction
from vla.runtime.trace import EpisodeRow, Trace
from vla.types import ControlMode

MS = 1_000_000
PERIOD = 50 * MS
ARM = Embodiment(
    "numbers", 20.0, "osc_delta", ("x",), ("1",), ("x",), "none", 1, ControlMode.OSC_DELTA, (Camera("front", 8, 8),)
)


def recorded() -> Trace:
    """Two chunks of 60 ms: the first runs from 100 ms on, the second, seen at 200 ms, from 300 ms on without two of its
    actions; then nothing is due."""
    trace = Trace(ARM, 50)
    for start in (0, 200):
        trace.inference(start * MS, (start + 60) * MS, 40.0, stamp_ns=start * MS)
        trace.add_image("front", start * MS, b"jpeg")
        trace.add_image("front", (start + 50) * MS, b"jpeg")
    for tick in range(14):
        now, due = tick * PERIOD, None
        number, index = (-1, -1) if tick < 2 or tick > 9 else (0, tick - 2) if tick < 6 else (1, tick - 4)
        if number >= 0:
            due = DueAction(np.zeros(1, np.float32), now, index, number, number * 200 * MS)
        verdict = Verdict.PASS if due else Verdict.STOP
        trace.tick(now, due, Decision(verdict, Reason.NONE, np.zeros(1)), np.zeros(1), 0, 1.0)
    trace.add_episode(EpisodeRow(1, "reach", "reach", True, 14, 13 * PERIOD))
    return trace


def bars(figure: Any) -> list[tuple[float, float, Any, str | None]]:
    """(left, width, face colour, hatch) of every bar, in seconds."""
    (axis,) = figure.axes
    return [(p.get_x(), p.get_width(), p.get_facecolor(), p.get_hatch()) for p in axis.patches]


def test_bars_and_ticks_are_those_of_the_trace() -> None:
    figure = draw(recorded())
    (axis,) = figure.axes
    drawn = [(round(left, 6), round(width, 6), colour, hatch) for left, width, colour, hatch in bars(figure)]
    blue, orange = (to_rgba(colour) for colour in COLOURS[:2])
    assert drawn == [
        (0.0, 0.06, (*blue[:3], 0.3), None), (0.02, 0.04, blue, None),
        (0.2, 0.06, (*orange[:3], 0.3), None), (0.22, 0.04, orange, None),
        (0.1, 0.2, blue, None),
        (0.2, 0.1, (0.0, 0.0, 0.0, 0.0), "////"), (0.3, 0.2, orange, None),
    ]  # fmt: skip
    assert [text.get_text() for text in axis.texts] == ["0–3", "2–5"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["command", "chunk", "inference", "image front"]
    ticks: dict[Any, list[float]] = {}
    for lines in axis.collections:
        segment = lines.get_segments()[0]
        if segment[0][1] < 0:  # the lane of the commands
            ticks.setdefault(tuple(lines.get_color()[0]), []).append(round(float(segment[0][0]), 6))
    assert ticks[blue] == [0.1, 0.15, 0.2, 0.25] and ticks[orange] == [0.3, 0.35, 0.4, 0.45]
    assert ticks[to_rgba(BAD)] == [0.0, 0.05, 0.5, 0.55, 0.6, 0.65]
    images = [lines.get_color()[0] for lines in axis.collections if lines.get_segments()[0][0][1] > 2.9]
    assert sum(np.allclose(colour, to_rgba(GREY)) for colour in images) == 4 and len(images) == 6


def test_a_window_shows_its_part_and_windows_that_are_not_there_are_refused() -> None:
    trace = recorded()
    (axis,) = draw(trace, start_s=0.27, seconds=0.1).axes
    assert axis.get_xlim() == pytest.approx((0.26, 0.38)) and [t.get_text() for t in axis.texts] == ["0–3", "2–5"]
    for arguments, words in (((1, 5.0, 1.0), r"5 of 0\.7 s"), ((2, 0.0, 1.0), "1 to 1"), ((0, 0.0, 1.0), "1 to 1")):
        with pytest.raises(DataError, match=words):
            draw(trace, *arguments)
    with pytest.raises(DataError, match="holds no other"):
        draw(Trace(ARM, 4))


def test_traces_without_images_or_stamps_are_drawn_too() -> None:
    trace = recorded()
    trace.images.clear()
    assert "observation" in [label.get_text() for label in draw(trace).axes[0].get_yticklabels()]
    trace.infer_stamp_ns[:] = trace.stamp_ns[:] = -1
    assert {colour[:3] for _, _, colour, hatch in bars(draw(trace)) if not hatch} == {to_rgba(GREY)[:3]}


def test_the_command_writes_a_picture_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = recorded().save_mcap(tmp_path / "trace.mcap")
    out = tmp_path / "new" / "timeline.png"
    assert main.main(["plot", "timeline", str(path), "--out", str(out), "--seconds", "0.4"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.size[0] == 1650 and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50
    wrong = {".png": ["--out", "a.bmp"], "more than 0": ["--seconds", "0"], "1 to 1": ["--episode", "9"]}
    for words, more in wrong.items():
        assert main.main(["plot", "timeline", str(path), *more]) == 2
        assert words in capsys.readouterr().err
