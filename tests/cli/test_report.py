"""Results, report and film of a synthetic run: what is written is what was measured, also after an interruption."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vla.cli import plots
from vla.cli.film import CAPTION, PANEL, FrameSpool, Shot, compose, write_film
from vla.cli.report import render, rows, write_report
from vla.cli.results import Episode, Event, RunRecord, write_results
from vla.runtime.summary import percentiles, wilson_95

KEYS = [
    "episodes", "successes", "success_rate", "wilson_95", "control_hz", "due_actions", "missed_actions",
    "inference_ms", "transport_ms", "peak_rss_mb", "gate", "seeds", "bundle_hash",
]  # fmt: skip


def record() -> RunRecord:
    times = np.arange(0, 12, 0.05)
    return RunRecord(
        env="tabletop",
        task="",
        policy="tabletop",
        rate_hz=20.0,
        seed=1_000_000,
        command_names=("joint1", "gripper"),
        episodes=[
            Episode(0, 1_000_000, "pick_place", "put the red cube on the <blue> plate", True, 100, 0.0, 5.0),
            Episode(1, 1_000_001, "stack", "stack the cubes", False, 140, 5.0, 12.0, "time was up"),
        ],
        requested=2,
        wall_s=12.0,
        control_hz=20.0,
        due_actions=240,
        missed_actions=1,
        late_actions=2,
        inference=np.stack([np.arange(0, 12, 0.4), np.linspace(10, 30, 30)], 1),
        transport_ms=np.linspace(1, 3, 30),
        commands=np.column_stack([times, np.sin(times), np.cos(times)]),
        gate={"pass": 200, "reshape": 38, "stop": 2},
        gate_reasons={"velocity": 38, "heartbeat silent": 2},
        dropped={"/camera/wrist/image_raw": 3, "/joint_states": 0},
        peak_rss_mb=900.5,
        rss_mb={"sim": 300.0, "policy": 600.5},
        events=[Event(6.0, "command", "heartbeat silent for 150 ms")],
        bundle_hash="ab12",
    )


def test_summary_has_the_promised_keys_and_right_numbers(tmp_path: Path) -> None:
    write_results(record(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == KEYS
    assert (summary["episodes"], summary["successes"], summary["success_rate"]) == (2, 1, 0.5)
    assert summary["wilson_95"] == pytest.approx([0.0945, 0.9055], abs=1e-3)
    assert list(summary["inference_ms"]) == ["p50", "p95", "p99"]
    assert list(summary["transport_ms"]) == ["p50", "p95"]
    assert summary["inference_ms"]["p50"] == pytest.approx(20.0)
    assert summary["peak_rss_mb"] == 900.5
    assert summary["seeds"] == [1_000_000, 1_000_001]
    assert not list(tmp_path.glob(".*.part"))


def test_late_actions_count_beside_missed_ones(tmp_path: Path) -> None:
    assert dict(rows(record()))["late or missed actions"] == "3 of 240 (1.25%)"


def test_nothing_measured_is_null_not_zero(tmp_path: Path) -> None:
    empty = RunRecord(env="tabletop", task="", policy="expert", rate_hz=20.0, seed=1, requested=20, interrupted=True)
    write_results(empty, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["inference_ms"] == {"p50": None, "p95": None, "p99": None}
    assert summary["wilson_95"] == [0.0, 1.0]
    assert "interrupted after 0 of 20" in render(empty)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "path", "br"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_report_is_one_closed_escaped_file(tmp_path: Path) -> None:
    film = tmp_path / "episodes.mp4"
    film.write_bytes(b"x")
    text = write_report(record(), tmp_path, film).read_text()
    tags = _Tags()
    tags.feed(text)
    assert not tags.open
    assert "&lt;blue&gt;" in text and "<blue>" not in text
    assert "heartbeat silent for 150 ms" in text
    # Nothing is loaded from elsewhere: the film lies beside the page, references inside the SVGs are fragments.
    assert all(source == "episodes.mp4" or source.startswith("#") for source in tags.sources)
    assert "<script" not in text


@pytest.mark.parametrize("plot", [plots.success_per_family, plots.timeline, plots.rates, plots.actions, plots.verdicts])
def test_plots_are_svg_for_full_and_empty_runs(plot) -> None:
    for run in (record(), RunRecord(env="tabletop", task="", policy="p", rate_hz=20.0, seed=1)):
        assert ElementTree.fromstring(plot(run)).tag.endswith("svg")


def test_success_plot_shows_counts() -> None:
    assert "1/1" in plots.success_per_family(record()) and "0/1" in plots.success_per_family(record())


def test_film_plays_back_with_both_views(tmp_path: Path) -> None:
    from vla.data.video import decode

    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 220, 220
    shots = [Shot((red, blue), "put it there", "episode 1 of 1", None), Shot((red, blue), "x" * 400, "end", True)]
    assert write_film(tmp_path / "film.mp4", shots, 20) == 2
    frames = list(decode(tmp_path / "film.mp4"))
    assert len(frames) == 2 and frames[0].shape == (CAPTION + PANEL, 2 * PANEL, 3)
    middle = CAPTION + PANEL // 2
    assert frames[0][middle, PANEL // 2].argmax() == 0
    assert frames[0][middle, PANEL + PANEL // 2].argmax() == 2


def test_caption_is_drawn_and_marks_the_outcome() -> None:
    view = np.zeros((32, 32, 3), np.uint8)
    running = compose(Shot((view,), "do it", "episode 1", None))
    good, bad = (compose(Shot((view,), "do it", "episode 1", flag)) for flag in (True, False))
    assert running[:CAPTION].max() > 200
    assert not np.array_equal(good, bad) and not np.array_equal(good, running)


def test_spool_returns_what_was_put_in_and_leaves_nothing(tmp_path: Path) -> None:
    spool = FrameSpool(tmp_path / "frames.raw")
    images = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    for image in images:
        spool.append(image)
    assert all(np.array_equal(spool[i], images[i]) for i in (3, 0, 4))
    with pytest.raises(ValueError, match="shape"):
        spool.append(np.zeros((4, 4, 3), np.uint8))
    spool.close()
    assert not list(tmp_path.iterdir())


def test_wilson_against_published_values() -> None:
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                         (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson_95(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_percentiles_of_nothing() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
    assert percentiles(range(101), (50,)) == {"p50": 50.0}
