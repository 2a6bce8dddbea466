"""Latency as data: read as it was measured, replayed by seed and number, drawn the same everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.hold import HoldPolicy
from sim import latency
from sim.environment import make
from sim.evaluate import EvalConfig, evaluate
from sim.latency import LatencyTrace
from sim.tabletop import environment as tabletop
from vla.cli.config import compose
from vla.configs import build
from vla.errors import ConfigError, DataError
from vla.resources import load_embodiment
from vla.runtime.loop import Delay
from vla.runtime.trace import Trace

MS = 1_000_000


def written(path: Path, data: object) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_a_runs_trace_is_split_into_inference_and_everything_else(tmp_path: Path) -> None:
    trace = Trace(load_embodiment("tabletop"), 4)
    trace.inference(100 * MS, 140 * MS, 31.5)
    trace.inference(200 * MS, 210 * MS, 12.0, accepted=False)  # measured elsewhere: never more than the round trip
    read = latency.read(str(trace.save_mcap(tmp_path / "trace.mcap")))
    assert read.delays == (Delay(31_500_000, 8_500_000), Delay(10 * MS, 0))


def test_json_holds_milliseconds_and_comes_back_to_the_nanosecond(tmp_path: Path) -> None:
    plain = latency.read(written(tmp_path / "a.json", [30, 20.5]))
    assert plain.delays == (Delay(30 * MS), Delay(20_500_000))
    both = latency.read(written(tmp_path / "b.json", {"inference_ms": [1.234567], "transport_ms": [0.000001]}))
    assert both.delays == (Delay(1_234_567, 1),)
    both.write(tmp_path / "c.json")
    assert latency.read(str(tmp_path / "c.json")).fingerprint == both.fingerprint != plain.fingerprint


def test_an_episode_meets_what_its_seed_and_the_number_of_the_inference_say() -> None:
    trace = LatencyTrace(tuple(Delay(n) for n in range(50)))
    first = [trace.of(7)(number).inference_ns for number in range(120)]
    trace.of(8)(0)
    assert [trace.of(7)(number).inference_ns for number in reversed(range(120))] == first[::-1]
    assert np.all(np.diff(first) % 50 == 1), "neighbours stay neighbours, and after the last comes the first"
    assert len({trace.of(seed)(0).inference_ns for seed in range(100)}) > 30


def test_scaling_and_the_periods_that_cover_it() -> None:
    trace = LatencyTrace((Delay(20 * MS, 10 * MS),) * 99 + (Delay(500 * MS),))
    assert trace.scaled(3).delays[0] == Delay(60 * MS, 30 * MS) and trace.scaled(0).delays[0].total_ns == 0
    assert [trace.scaled(k).periods(0.05, 95) for k in (0, 1, 2, 10)] == [1, 1, 2, 6]
    assert trace.periods(0.05, 100) == 10
    with pytest.raises(ConfigError, match="latency_scale"):
        trace.scaled(-1)


def test_distributions_are_what_they_say_and_the_same_on_every_machine() -> None:
    """Fingerprints from one machine: draws come from integers, and are rounded where a C library may differ."""
    drawn = latency.read("lognormal:p50=30,p95=60,seed=1")
    assert drawn.describe()["total_ms"]["p50"] == pytest.approx(30, rel=0.05)
    assert drawn.describe()["total_ms"]["p95"] == pytest.approx(60, rel=0.05)
    assert drawn.fingerprint == "6150f4554ae46b95"
    assert latency.read("lognormal:p50=30,p95=60,seed=2").fingerprint != drawn.fingerprint
    spread = [delay.inference_ns for delay in latency.read("uniform:low=20,high=80").delays]
    assert 20 * MS <= min(spread) < 21 * MS and 79 * MS < max(spread) <= 80 * MS
    assert set(latency.read("constant:ms=50").delays) == {Delay(50 * MS)}


def test_the_shipped_trace_is_there() -> None:
    facts = latency.read("two_cores").describe()
    assert facts["inferences"] > 100 and 10 < facts["total_ms"]["p50"] < facts["total_ms"]["max"] < 200


@pytest.mark.parametrize(
    "data",
    [[], [-1.0], [float("nan")], ["30"], [True], {}, {"inference_ms": [1], "transport_ms": []}, 3,
     {"inference_ms": {"p50": 21.0}}],
)  # fmt: skip
def test_files_that_hold_no_latencies_are_refused_by_name(data: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.json"):
        latency.read(written(tmp_path / "bad.json", data))


def test_a_summary_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"percentiles; give the trace\.mcap"):
        latency.read(written(tmp_path / "summary.json", {"inference_ms": {"p50": 21.0}}))
    with pytest.raises(DataError, match=r"none\.json"):
        latency.read(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("source", "words"),
    [("two_core", "Did you mean 'two_cores'"), ("lognormal:p50=30", "p95"), ("lognormal:p50=30,p95=20", "out of range"),
     ("lognormall:p50=1", "Did you mean 'lognormal'"), ("constant:ms=50,sed=1", "unknown sed"),
     ("uniform:low=x,high=2", "low"), ("uniform", "low")],
)  # fmt: skip
def test_names_and_settings_that_do_not_exist_say_so(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        latency.read(source)


def test_evaluation_replays_a_trace_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop and think with 120 ms: three periods of pause behind every 8 actions, whatever this machine takes."""
    base = EvalConfig(policy="hold", episodes=1, task="push", scheduler="sequential")
    monkeypatch.setattr(tabletop, "MAX_EPISODE_S", 4.0)
    environment = make("tabletop")
    try:
        policy = HoldPolicy(environment.embodiment)
        replayed = replace(base, latency=written(tmp_path / "a.json", [60.0]), latency_scale=2.0)
        (record,) = evaluate(policy, replayed, environment=environment).episodes
        (constant,) = evaluate(policy, replace(base, latency_s=0.12), environment=environment).episodes
    finally:
        environment.close()
    assert record.motion == constant.motion and record.motion is not None
    assert record.motion["longest_pause"] == 3 and record.motion["switches"] == 6
    assert record.motion["pauses"] in range(18, 22), "six whole pauses, and what the end left of a seventh"
    first = replayed.identity("hold", "none")
    written(tmp_path / "a.json", [61.0])
    assert replayed.identity("hold", "none") != first, "a file that changed is another run"
    assert base.identity("hold", "none")["latency"] is None


@pytest.mark.parametrize("source", ["two_cores", "outputs/demo/trace.mcap", "lognormal:p50=30,p95=60,seed=1"])
def test_the_command_line_takes_names_files_and_distributions(source: str) -> None:
    """A folder configs/latency would make of the key a choice among its files."""
    config = build(compose("eval", [f'latency="{source}"', "latency_scale=3"]))
    assert (config.latency, config.latency_scale) == (source, 3)
