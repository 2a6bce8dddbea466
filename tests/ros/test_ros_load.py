"""The accounting of benchmarks/ros_load.py, on streams whose answer is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_SPEC = importlib.util.spec_from_file_location("ros_load", Path(__file__).parents[2] / "benchmarks" / "ros_load.py")
assert _SPEC is not None and _SPEC.loader is not None
load = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(load)
MS = 1_000_000


def test_periods_are_those_between_arrivals() -> None:
    times = np.arange(1001) * 10 * MS
    times[500:] += 15 * MS  # one period of 25 ms
    found = load.periods(times, bound_ms=20.0)
    assert found["count"] == 1000 and found["held"] == pytest.approx(0.999)
    assert (found["p50_ms"], found["max_ms"]) == (10.0, 25.0)
    assert load.periods(times[::2], bound_ms=20.0)["held"] == 0.0, "a lost command is a long period: 20 ms is not under"
    assert load.periods([], 20.0)["held"] == load.periods([5], 20.0)["held"] == 0.0


def test_memory_grows_from_the_end_of_the_warm_up() -> None:
    samples = [(float(t), 100e6 if t >= 20 else 50e6) for t in range(100)]
    assert load.growth(samples, warm_s=20.0)["growth_percent"] == 0.0
    samples = [(float(t), 100e6 + 1e5 * max(0, t - 50)) for t in range(101)]
    assert load.growth(samples, warm_s=20.0)["growth_percent"] == pytest.approx(4.65, abs=0.1)
    samples[-1] = (100.0, 900e6)  # one sample decides nothing
    assert load.growth(samples, warm_s=20.0)["growth_percent"] < 5.0
    assert load.growth([(0.0, 7e6)], warm_s=20.0)["growth_percent"] == 0.0


def test_what_was_sent_and_did_not_come_is_lost_by_that_node() -> None:
    sent = {"/joint_states": 500, "/image": 30}
    received = {"policy": {"/joint_states": 498, "/image": 29, "/vla/request": 3}, "command": {"/joint_states": 500}}
    assert load.losses(sent, received) == {
        "/joint_states -> policy": 2,
        "/image -> policy": 1,
        "/joint_states -> command": 0,
    }


def test_steal_is_a_part_of_all_time() -> None:
    steal, total = load.cpu_times()
    assert 0 <= steal <= total and total > 0
