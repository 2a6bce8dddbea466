"""The decode benchmark: what it compares, how it counts, what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from sim import decode_benchmark as bench
from sim import decode_costs, decode_entries
from sim.evaluate import EpisodeRecord, EvalConfig
from vla import configs
from vla.cli import main
from vla.decoding.costs import LENGTHS
from vla.errors import DataError
from vla.resources import bundle_path


@pytest.fixture(scope="module")
def policy(tiny_bundle) -> VlaPolicy:
    return VlaPolicy.from_bundle(tiny_bundle, threads=1)


def episode(seed: int, success: bool) -> EpisodeRecord:
    return EpisodeRecord(seed, "push", "push", "push it", success, 10, None, None, 2, None, {}, 10, 0)


def pairs(both: int, gained: int, lost: int, neither: int) -> bench.Paired:
    mine = [True] * both + [True] * gained + [False] * lost + [False] * neither
    theirs = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return bench.Paired.of([episode(i, s) for i, s in enumerate(mine)], [episode(i, s) for i, s in enumerate(theirs)])


def test_paired_differences_have_newcombes_interval() -> None:
    """Newcombe (1998, Statistics in Medicine 17, 2635), method 10: 36, 12, 2, 0 of 50 gives 0.0569 to 0.3404."""
    paired = pairs(36, 12, 2, 0)
    assert paired.difference == pytest.approx(0.2)
    assert paired.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert paired.verdict == "better"
    assert pairs(90, 3, 4, 3).verdict == "inconclusive"
    assert pairs(50, 2, 40, 8).verdict == "worse"
    low, high = pairs(100, 0, 0, 0).interval
    assert low < 0 < high  # nothing differs, and 100 pairs cannot say that nothing would


def test_pairs_need_the_same_seeds() -> None:
    with pytest.raises(DataError, match="same seeds"):
        bench.Paired.of([episode(1, True)], [episode(2, True)])


def test_lines_that_a_bundle_cannot_serve_say_why(policy) -> None:
    good, refused = decode_entries.served(policy, decode_entries.ENTRIES)
    names = [entry.name for entry in good]
    assert "greedy FAST" in names and "greedy bins" not in names
    assert "Train one" in refused["flow, 10 steps"] and "bins" in refused["greedy bins"]
    assert "Train with heads.fast.exit_layer=2" in refused["early exit FAST"] and "continued FAST" in names
    used = {entry.config for entry in decode_entries.ENTRIES}
    assert used == set(configs.names("decoder"))  # every decoder is measured
    assert {entry.reference for entry in decode_entries.ENTRIES if entry.reference} <= {
        e.name for e in decode_entries.ENTRIES
    }


def test_costs_are_of_all_decoders_on_the_same_observations(policy) -> None:
    seen = decode_costs.observations(policy, EvalConfig(episodes=1), 4)
    assert seen[0][1].previous is None and seen[1][1].previous is not None  # contexts as in the loop
    entries = [e for e in decode_entries.ENTRIES if e.name in ("greedy FAST", "jacobi FAST, 4")]
    ticks = []
    costs = decode_costs.costs(policy, entries, seen, lambda: ticks.append(1))
    greedy, jacobi = (costs[e.name] for e in entries)
    assert len(ticks) == 3 + 4 and len(greedy.ids) == len(jacobi.ids) == 4
    assert greedy.ids == jacobi.ids
    assert (greedy.passes == greedy.tokens).all() and (jacobi.passes <= greedy.passes).all()
    assert jacobi.flops > greedy.flops > 1e6  # it looks at tokens that it throws away
    row = bench.row(entries[1], costs, 8, {})
    assert row["same_chunks"] == 1.0 and row["rms_to_reference"] == 0.0 and row["success_rate"] is None
    assert set(row) >= {
        "decoder", "config", "exact", "passes_per_chunk", "ms_per_chunk", "tokens_per_s", "actions_per_s", "refresh_hz",
        "flops_per_chunk", "repaired", "n", "success_rate", "wilson_95", "paired_difference",
    }  # fmt: skip
    json.dumps(row)
    curve = decode_costs.cost_curve(policy, "fast", seen[0], repeats=2)
    assert list(curve) == list(LENGTHS) and all(ms > 0 for ms in curve.values())


def test_anytime_error_falls_with_the_deadline(policy) -> None:
    seen = decode_costs.observations(policy, EvalConfig(episodes=1), 6)
    greedy = next(e for e in decode_entries.ENTRIES if e.name == "greedy FAST")
    cost = decode_costs.costs(policy, [greedy], seen)["greedy FAST"]
    slow = replace(cost, total_ms=np.full(6, 1e5), decode_ms=np.full(6, 1e5 - 0.1))
    first, *_, last = decode_costs.anytime_curve(policy, "fast", seen, slow, points=3)
    assert first.deadline_ms < 1 and 0 < first.cut <= 1 and first.rms > 0  # frequency 0 is all there is
    assert last.cut == 0 and last.rms == pytest.approx(0, abs=1e-6) and last.ms > first.ms


def test_tokens_that_never_change_are_not_counted_as_settled() -> None:
    chunk = np.zeros((2, 3))
    ids = [(5, 9, 7, 5, 1, 7), (5, 2, 7, 5, 3, 8)]  # the first of three values is always 5

    def cost(ids):
        ones = np.ones(2)
        return decode_costs.Cost(ones, ones, ones, ones, np.full(2, 6), 0, ids, [chunk] * 2, 1.0)

    assert bench.moving_share(cost(ids), 3) == pytest.approx(2 / 3)
    assert bench.moving_share(cost([(1, 2), (1, 2, 3)]), 3) == 1.0  # FAST: a token is no value


def test_time_outside_the_passes_and_flips_in_bf16_are_measured(policy) -> None:
    seen = decode_costs.observations(policy, EvalConfig(episodes=1), 3)
    entries = [e for e in decode_entries.ENTRIES if e.name in ("greedy FAST", "jacobi FAST", "anytime FAST")]
    costs = decode_costs.costs(policy, entries, seen)
    for cost in costs.values():
        assert (cost.pass_ms > 0).all() and (cost.pass_ms < cost.decode_ms).all()
    assert costs["greedy FAST"].flips is None and costs["anytime FAST"].flips is None
    assert 0 <= costs["jacobi FAST"].flips <= 1 and costs["jacobi FAST"].window >= 1
    row = bench.row(entries[1], costs, 8, {})
    assert row["overhead"] > 0 and row["speedups"].keys() == {"greedy FAST"}


def test_flops_do_not_depend_on_where_a_pass_runs(policy) -> None:
    """A one-token pass runs in numpy, where nothing counts: counting takes it to torch and back."""
    seen = decode_costs.observations(policy, EvalConfig(episodes=1), 1)
    entry = next(e for e in decode_entries.ENTRIES if e.name == "greedy FAST")
    first = decode_costs._flops(policy, entry, seen)
    assert first == decode_costs._flops(policy, entry, seen)
    with decode_costs._in_torch():
        there = policy.infer_batch([seen[0][0]], [seen[0][1]])[0].report.ids
    assert there == policy.infer_batch([seen[0][0]], [seen[0][1]])[0].report.ids


def test_reuse_is_counted_in_episodes_and_halves_the_cost() -> None:
    always = decode_costs.Cost(
        np.full(4, 10.0),
        np.full(4, 5.0),
        np.full(4, 4.0),
        np.full(4, 7),
        np.full(4, 7),
        0,
        [(1,)] * 4,
        [np.zeros((2, 2))] * 4,
        1e6,
    )
    entry = decode_entries.Entry("reused", "autoregressive", ("head=fast",), "greedy FAST", "score", "flashvla")
    row = bench.row(entry, {"reused": always, "greedy FAST": always}, 8, {}, decode_costs.Reuse(0.5, (2.0,)))
    assert not row["exact"] and row["speedup"] == pytest.approx(10 / 6, abs=1e-3) and row["passes_per_chunk"] == 3.5
    assert row["actions_per_s"] == pytest.approx(8 / 6e-3, abs=0.1) and row["flops_per_chunk"] == 500_000
    assert row["config"]["reuse"]["_target_"].endswith("ReuseRule") and row["config"]["pruning"]["drop"] is False


def test_percentiles_are_of_all_inferences_those_that_reuse_too() -> None:
    """As if the samples had been drawn: so many forwards, so many reuses."""
    rng = np.random.default_rng(0)
    forward, reused = rng.uniform(8, 12, 1000), rng.uniform(0.1, 0.3, 300)
    every = decode_costs.Cost(
        forward, forward / 2, forward / 3, np.full(1000, 7), np.full(1000, 7), 0, [(1,)] * 1000,
        [np.zeros((2, 2))] * 1000, 1e6,
    )  # fmt: skip
    entry = decode_entries.Entry("reused", "autoregressive", ("head=fast",), "greedy FAST", "score", "flashvla")
    costs = {"reused": every, "greedy FAST": every}
    for share, runs in ((0.6, 200), (0.25, 900), (0.03, 9700)):
        row = bench.row(entry, costs, 8, {}, decode_costs.Reuse(share, tuple(reused)))
        samples = np.concatenate(
            (np.resize(forward, runs * 10), np.resize(reused, round(runs * 10 * share / (1 - share))))
        )
        for key, percent in (("p50", 50), ("p95", 95)):
            assert row["ms_per_chunk"][key] == pytest.approx(np.percentile(samples, percent), rel=0.01)
        assert row["refresh_hz"] == pytest.approx(1e3 / samples.mean(), rel=0.01)
        assert row["first_action_ms"] == row["ms_per_chunk"]
    plain = bench.row(entry, costs, 8, {})
    assert plain["ms_per_chunk"]["p50"] == pytest.approx(np.percentile(forward, 50), abs=1e-3)


def test_times_on_a_gpu_are_of_work_that_is_done(monkeypatch) -> None:
    """A clock that a synchronisation moves on by what was launched since the last: a pass has to hold its own work, and
    none of the prefix's."""
    from vla.models.suffix import TokenSuffix
    from vla.models.vla import Vla

    clock = {"now": 0.0, "launched": 0.0}

    def synchronize(device) -> None:
        clock["now"], clock["launched"] = clock["now"] + clock["launched"], 0.0

    def launching(seconds):
        def work(*args, **kwargs):
            clock["launched"] += seconds
            return "out"

        return work

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(decode_costs.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(Vla, "prefix", launching(100.0))
    monkeypatch.setattr(TokenSuffix, "hidden", launching(1.0))
    monkeypatch.setattr(TokenSuffix, "logits", lambda self: TokenSuffix.hidden(self))
    with decode_costs._timed_passes(torch.device("cuda")) as passes:
        assert Vla.prefix(None) == "out" and clock == {"now": 100.0, "launched": 0.0}
        for _ in range(3):
            clock["launched"] += 10.0  # the decoder's own
            assert TokenSuffix.logits(None) == "out"
    assert passes.ms == 3e3 and clock["now"] == 133.0


def test_a_cpu_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("synchronised"))
    with decode_costs._timed_passes(torch.device("cpu")) as passes:
        assert passes.ms == 0.0


def test_the_share_of_reuses_comes_from_the_policys_own_episodes() -> None:
    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), threads=1)
    entry = next(e for e in decode_entries.ENTRIES if e.name == "reused FAST")
    reuse = decode_costs.reuse_share(policy, entry, EvalConfig(), episodes=3)
    assert (
        0 <= reuse.share <= 0.5 and sum(reuse.ms) <= 5 * len(reuse.ms) and policy.selection is None
    )  # at most every other inference


def test_success_runs_are_split_resumed_and_paired(tiny_bundle, tmp_path) -> None:
    entry = next(e for e in decode_entries.ENTRIES if e.name == "anytime FAST")
    config = replace(EvalConfig(), episodes=2, task="push")
    counts: list[int] = []
    report = bench.success(str(tiny_bundle), entry, config, tmp_path, 1, counts.append)
    assert counts == [2] and [e.seed for e in report.episodes] == [config.seed, config.seed + 1]
    again = bench.success(str(tiny_bundle), entry, config, tmp_path, 1, counts.append)
    assert again.episodes == report.episodes
    paired = bench.Paired.of(report.episodes, again.episodes)
    assert (paired.gained, paired.lost) == (0, 0)


def test_the_command_prints_and_writes(tiny_bundle, tmp_path, capsys) -> None:
    arguments = ["bench", "decode", "--policy", str(tiny_bundle), "--observations", "10", "--out", str(tmp_path)]
    assert main.main([*arguments, "--only", "jacobi FAST, 4"]) == 0
    out = capsys.readouterr().out
    assert "greedy FAST" in out and "jacobi FAST, 4" in out and "a pass over so many tokens" in out
    results = json.loads((tmp_path / "decode.json").read_text())
    assert [row["decoder"] for row in results["rows"]] == ["greedy FAST", "jacobi FAST, 4"]
    page = (tmp_path / "decode.md").read_text().splitlines()
    assert {line.count("|") for line in page if line.startswith("|")} == {15} and "| jacobi FAST, 4 | yes |" in page[-1]
    assert results["bundle_hash"] and np.isfinite(results["rows"][0]["ms_per_chunk"]["p50"])
    assert main.main([*arguments, "--only", "jacobbi"]) == 2
    assert "Did you mean" in capsys.readouterr().err
