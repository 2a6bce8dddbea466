"""The scheduler benchmark: same trace, same seeds, same results, and schedules do what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sim import scheduler_benchmark as bench
from sim.evaluate import EvalConfig
from sim.latency import LatencyTrace
from sim.shares import merged, run_shares, shares
from sim.tabletop import environment
from vla.checkpoints.bundle import load
from vla.cli import main
from vla.runtime.loop import Delay

MS = 1_000_000


def command(bundle: Path, latency: Path, out: Path, *more: str) -> list[str]:
    return [
        "bench", "schedulers", "--policy", str(bundle), "--latency", str(latency), "--task", "push", "--episodes", "1",
        "--workers", "0", "--scales", "2", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_episodes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "MAX_EPISODE_S", 4.0)
        yield


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latency") / "trace.json"
    path.write_text(json.dumps([60.0, 60.0, 90.0]))
    return path


@pytest.fixture(scope="module")
def results(tiny_bundle: Path, latency: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    out = tmp_path_factory.mktemp("schedulers")
    assert main.main(command(tiny_bundle, latency, out)) == 0
    assert (out / "schedulers.png").stat().st_size > 10_000
    assert (out / "schedulers.md").read_text().count("| overlapped, FAST |") == 1
    whole = (out / "schedulers.json").read_bytes()
    return whole, json.loads(whole)


def test_the_same_trace_and_seeds_give_the_same_file(results, tiny_bundle, latency, tmp_path) -> None:
    some, again = "overlapped, FAST", []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert main.main(command(tiny_bundle, latency, out, "--only", some)) == 0
        again.append((out / "schedulers.json").read_bytes())
    assert again[0] == again[1]
    rows = json.loads(again[0])["rows"]
    assert len(rows) == 2 and rows == results[1]["rows"][:2], "other lines beside it change nothing"


def test_schedules_do_what_they_are_called(results) -> None:
    rows = {row["schedule"].removesuffix(", FAST"): row for row in results[1]["rows"]}
    waits, overlaps, fused = rows["stop and think"], rows["overlapped"], rows["ensembled"]
    assert list(rows) == ["stop and think", "overlapped", "ensembled", "continued"]
    # 120 or 180 ms: three or four periods of 50
    assert waits["longest_pause"] == 4 and waits["lead"] is None and overlaps["pauses"] == 0 < waits["pauses"]
    assert waits["pause_share"] == pytest.approx(waits["pauses"] / waits["periods"], abs=1e-6)
    assert overlaps["lead"] == fused["lead"] == fused["execute"] == 4 and overlaps["execute"] == 8
    assert fused["inferences_per_episode"] > 1.3 * overlaps["inferences_per_episode"]
    assert fused["age_ms"] < overlaps["age_ms"]
    compared = [row["paired_difference"] and row["paired_difference"]["to"] for row in results[1]["rows"]]
    assert compared == [None, "stop and think, FAST", "overlapped, FAST", "overlapped, FAST"]


def test_what_a_bundle_cannot_serve_is_named(results, tiny_bundle) -> None:
    refused = results[1]["not_served"]
    assert "Train one" in refused["real-time chunking, flow"] and "bins" in refused["forced, bins"]
    good, reasons = bench.served(load(tiny_bundle), bench.LINES)
    assert [line.name for line in good] == [r["schedule"] for r in results[1]["rows"]]
    assert reasons == refused
    names = {line.name for line in bench.LINES}
    assert {line.reference for line in bench.LINES} - {""} <= names and len(names) == len(bench.LINES)


def test_finished_episodes_are_not_run_again_and_lines_bring_their_references(
    tiny_bundle, latency, tmp_path, capsys
) -> None:
    arguments = command(tiny_bundle, latency, tmp_path, "--only", "ensembled, FAST", "--json")
    assert main.main(arguments) == 0
    first = capsys.readouterr().out
    assert [row["schedule"] for row in json.loads(first)["rows"]] == [
        "stop and think, FAST", "overlapped, FAST", "ensembled, FAST",
    ]  # fmt: skip
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("none.json")}
    assert main.main(arguments) == 0
    assert capsys.readouterr().out == first and len(stamps) == 3
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert main.main(command(tiny_bundle, latency, tmp_path, "--only", "overlaped, FAST")) == 2
    assert "Did you mean 'overlapped, FAST'" in capsys.readouterr().err


def test_the_lead_covers_the_scaled_trace_as_far_as_chunks_allow() -> None:
    trace = LatencyTrace((Delay(30 * MS),) * 9 + (Delay(80 * MS),))
    assert [bench.lead_for(trace, scale, 0.05, 8) for scale in (0, 0.5, 1, 3, 10)] == [1, 1, 2, 5, 8]


def test_shares_of_a_run_are_the_run(tmp_path) -> None:
    """Cut anywhere, the seeds are those of the whole, and so are the latencies they meet."""
    config = EvalConfig(policy="expert", episodes=5, task="push", seed=1_000_010)
    parts = shares(config, tmp_path, most=2)
    assert [(part.seed, part.episodes) for part in parts] == [(1_000_010, 2), (1_000_012, 2), (1_000_014, 1)]
    assert len({part.out for part in parts}) == 3
    counts: list[int] = []
    report = merged(run_shares(bench._measure, parts[::-1], 0, counts.append))
    assert counts == [1, 2, 2] and [e.seed for e in report.episodes] == list(range(1_000_010, 1_000_015))
