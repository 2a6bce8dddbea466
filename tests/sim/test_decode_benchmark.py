"""The decode benchmark: what it compares, how it counts, what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policies.parts import Parts
from policies.vla_policy import VlaPolicy
from sim import decode_benchmark as bench
from sim import decode_costs, decode_entries
from sim.evaluate import EpisodeRecord, EvalConfig, Report
from tests.conftest import tiny_config
from vla.checkpoints.bundle import save
from vla.cli import bench_decode, main
from vla.decoding.costs import LENGTHS, settled_per_pass
from vla.errors import DataError
from vla.models.pruning import TokenSelection, prefix_flops
from vla.resources import bundle_path
from vla.training.recipes import HeadRecipe, TokenizerRecipe
from vla.training.trainer import Trainer


@pytest.fixture(scope="module")
def policy(tiny_bundle) -> VlaPolicy:
    return VlaPolicy.from_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def seen(policy):
    return decode_costs.observations(policy, EvalConfig(episodes=1), 6)[0]


EIGHT = dict.fromkeys((entry.name for entry in decode_entries.ENTRIES), decode_costs.Pace(8.0))


def entries(*names: str) -> list[decode_entries.Entry]:
    return [entry for entry in decode_entries.ENTRIES if entry.name in names]


def cost(ids, passes: int = 1, actions=None, **changes) -> decode_costs.Cost:
    """Of so many chunks, each of which took 10 ms, half of them decoding."""
    ones = np.ones(len(ids))
    actions = [np.zeros((2, 3))] * len(ids) if actions is None else actions
    return replace(
        decode_costs.Cost(
            10 * ones,
            5 * ones,
            4 * ones,
            0.4 * ones,
            passes * ones,
            np.array([len(row) for row in ids]),
            0,
            ids,
            actions,
            1e6,
        ),
        **changes,
    )


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


def test_costs_are_of_all_decoders_on_the_same_observations(policy, seen) -> None:
    seen = seen[:4]
    assert seen[0][1].previous is None and seen[1][1].previous is not None  # contexts as in the loop
    lines = entries("greedy FAST", "jacobi FAST, 4")
    ticks = []
    costs = decode_costs.costs(policy, lines, seen, lambda: ticks.append(1))
    greedy, jacobi = (costs[e.name] for e in lines)
    assert len(ticks) == 3 + 4 and len(greedy.ids) == len(jacobi.ids) == 4
    assert greedy.ids == jacobi.ids
    assert (greedy.passes == greedy.tokens).all() and (jacobi.passes <= greedy.passes).all()
    assert jacobi.flops > greedy.flops > 1e6  # it looks at tokens that it throws away
    row = bench.row(lines[1], costs, EIGHT, {})
    assert row["same_chunks"] == 1.0 and row["rms_to_reference"] == 0.0 and row["success_rate"] is None
    assert set(row) >= {
        "decoder", "config", "exact", "passes_per_chunk", "ms_per_chunk", "tokens_per_s", "actions_per_s", "refresh_hz",
        "flops_per_chunk", "repaired", "n", "success_rate", "wilson_95", "paired_difference",
    }  # fmt: skip
    json.dumps(row)
    curve = decode_costs.cost_curve(policy, "fast", seen[0], repeats=2)
    assert list(curve) == list(LENGTHS) and all(ms > 0 for ms in curve.values())


def test_every_entry_has_its_own_history(policy, seen) -> None:
    for entry in entries("greedy FAST", "ensembled FAST", "continued FAST"):
        run = decode_costs._Run(policy, entry)
        for observation, context in seen:
            run.step(observation, context, decode_costs.PassWatch())
        for number, ((_, told), (_, context)) in enumerate(zip(run.told, seen)):
            assert (told.previous is None) == (context.previous is None) and told.executed == context.executed
            if told.previous is not None:
                mine, _ = run.took[number - 1]
                assert np.array_equal(told.previous.actions, mine.chunk.actions), entry.name
                assert told.previous.start_ns == context.previous.start_ns
                kept = mine.chunk.actions[told.executed :][: len(context.committed)]
                assert len(kept) and np.array_equal(told.committed, kept)


def test_entries_take_turns_in_an_order_drawn_for_each_observation(policy, seen, monkeypatch) -> None:
    monkeypatch.setattr(decode_costs, "_flops", lambda *_: 1.0)
    monkeypatch.setattr(decode_costs, "_flips", lambda *_: {})
    step, turns = decode_costs._Run.step, []

    def noted(self, observation, *rest):
        turns.append(self.parts.decoder.head + str(getattr(self.parts.decoder, "window", "")))
        step(self, observation, *rest)

    monkeypatch.setattr(decode_costs._Run, "step", noted)
    lines = [
        replace(entry, options=("head=fast", f"window={n}"))
        for n, entry in enumerate(entries("jacobi FAST", "jacobi FAST, 4", "speculative FAST, previous chunk"), 2)
        if entry.config == "jacobi"
    ]
    drawn = []
    for seed in (0, 0, 1):
        turns.clear()
        decode_costs.costs(policy, lines, seen, seed=seed)
        drawn.append([tuple(turns[at : at + 2]) for at in range(0, len(turns), 2)])
    assert {frozenset(turn) for turn in drawn[0]} == {frozenset({"fast2", "fast3"})}  # each once per observation
    assert len(set(drawn[0])) == 2 and drawn[0] == drawn[1] != drawn[2]


def test_what_ensembling_and_continuing_change_is_no_equal_chunk(policy, seen, monkeypatch) -> None:
    monkeypatch.setattr(decode_costs, "_flops", lambda *_: 1.0)
    lines = entries("greedy FAST", "greedy FAST, again", "ensembled FAST")
    costs = decode_costs.costs(policy, lines, seen)
    again, mean = (bench.row(line, costs, EIGHT, {}) for line in lines[1:])
    assert again["same_chunks"] == 1 and again["rms_to_reference"] == 0 and again["bf16_flips"] == 0
    assert mean["same_chunks"] < 1 and mean["rms_to_reference"] > 0


def test_anytime_error_falls_with_the_deadline(policy, seen) -> None:
    first, last = decode_costs.anytime_curve(policy, "fast", seen, (0.1, 1e5))
    assert 0 < first.cut <= 1 and first.rms > 0  # frequency 0 is all there is
    assert last.cut == 0 and last.rms == pytest.approx(0, abs=1e-6) and last.ms > first.ms


def test_the_deadline_cuts_half_of_the_values() -> None:
    def curve(*cuts):
        return [decode_costs.Cut(10.0 + 4 * place, 0, cut, 0) for place, cut in enumerate(cuts)]

    assert decode_costs.half_cut(curve(0.9, 0.6, 0.4, 0.0)) == 16.0
    assert decode_costs.half_cut(curve(0.3, 0.1, 0.0)) == 10.0  # never: the shortest
    assert 10 < decode_costs.half_cut(curve(0.8, 0.85, 0.3, 0.31, 0.0)) < 18


def test_one_share_of_moving_values_serves_all_heads() -> None:
    lines = entries("greedy bins", "greedy distilled", "greedy FAST")
    ids = [[(5, 9, 7, 5, 1, 7)] * 2, [(1, 2, 3, 4, 5, 6)] * 2, [(1, 2), (1, 2, 3)]]
    costs = {line.name: cost(said, passes=2) for line, said in zip(lines, ids)}
    per_pass = [bench.row(line, costs, EIGHT, {}, moving=2 / 3)["tokens_per_pass"] for line in lines]
    assert per_pass == [2.0, 2.0, 1.25]  # a FAST token is no value


def test_rows_without_their_reference_say_nothing_of_it() -> None:
    (flow,) = entries("flow, 4 steps")
    costs = {flow.name: cost([(), ()]), "greedy FAST": cost([(1,), (2,)], total_ms=np.full(2, 20.0))}
    row = bench.row(flow, costs, EIGHT, {flow.name: Report({}, (episode(1, True),))})
    assert row["reference"] == "greedy bins" and row["speedups"] == {"greedy FAST": 2.0}
    for key in ("speedup", "same_chunks", "rms_to_reference", "paired_difference"):
        assert row[key] is None, key
    assert row["success_rate"] == 1.0 and all(bench_decode._costs(row)) is False and bench_decode._work(row)


def test_the_ensemble_is_paired_with_each_of_its_halves() -> None:
    names = ["greedy bins", "diffusion, 4 steps", "hybrid tokens", "hybrid ensemble"]
    lines = {entry.name: entry for entry in entries(*names)}
    assert [entry.name for entry in decode_entries.chosen(names[3:])] == [names[0], "greedy bins, again", *names[1:]]
    costs = {name: cost([(), ()], notes={"averaged": 0.25, "layers": 12.0, "missed": 0.5}) for name in names}
    won = {"greedy bins": 2, "diffusion, 4 steps": 1, "hybrid tokens": 3, "hybrid ensemble": 4}
    reports = {name: Report({}, tuple(episode(i, i < won[name]) for i in range(4))) for name in names}
    row = bench.row(lines["hybrid ensemble"], costs, EIGHT, reports)
    differences = [row["paired_difference"], *row["further_differences"]]
    assert {d["to"]: d["points"] for d in differences} == {
        "greedy bins": 50.0, "hybrid tokens": 25.0, "diffusion, 4 steps": 75.0,
    }  # fmt: skip
    assert "wilson_95" not in differences[0] and len(differences[0]["newcombe_95"]) == 2
    assert [line[-1] for line in bench_decode._success(row)] == [d["to"] for d in differences]
    assert row["averaged"] == 0.25 and row["layers"] == 12.0 and row["notes"] == {"missed": 0.5}
    assert "25 %" in bench_decode._work(row) and "12.0" in bench_decode._costs(row)
    del reports["greedy bins"]
    row = bench.row(lines["hybrid ensemble"], costs, EIGHT, reports)
    assert row["paired_difference"] is None and len(row["further_differences"]) == 2


def test_agreement_is_that_of_windows_and_of_drafts() -> None:
    jacobi, draft = entries("jacobi bins, 8", "speculative bins, previous chunk")
    for line, length, notes in ((jacobi, 8, {"window": 8.0}), (draft, 9, {"window": 9.0})):
        settled = float(settled_per_pass(length, 0.7))
        of = cost([tuple(range(1000))] * 2, notes=notes, passes=1000 / settled)
        row = bench.row(line, {line.name: of}, EIGHT, {})
        assert row["window"] == length and row["agreement"] == pytest.approx(0.7, abs=1e-3)
        assert "0.70" in bench_decode._work(row)


def test_repaired_tokens_are_counted_not_chunks(policy, seen) -> None:
    run = decode_costs._Run(policy, entries("greedy FAST")[0])
    for observation, context in seen[:2]:
        run.step(observation, context, decode_costs.PassWatch())
    run.took = [(replace(r, report=replace(r.report, repaired=3)), ms) for r, ms in run.took]
    assert run.cost(policy.bundle, 1.0, None).repaired == 6


def test_flops_hold_the_eigendecomposition_of_pruning(policy, seen) -> None:
    parts = entries("greedy FAST")[0].parts
    scored = TokenSelection(1, 0.5, drop=False)  # the suffix stays as it is
    plain, more = (decode_costs._flops(policy, Parts(parts.decoder, s), seen[:2]) for s in (None, scored))
    policy.selection = None
    config = policy.bundle.config
    assert more - plain == prefix_flops(config, scored) - prefix_flops(config) > 9 * config.visual_tokens**3


def test_flips_are_those_from_greedy_whatever_else_is_measured(policy, seen) -> None:
    (line,) = entries("jacobi FAST, 4")
    kept = policy.decoder
    flips = decode_costs._flips(policy, [line], {line.name: seen[:3]})
    policy.decoder = kept
    assert 0 <= flips[line.name] <= 1


def test_tokens_that_are_not_greedys_are_flips(policy, seen) -> None:
    """Of four chunks, two."""
    (line,) = entries("jacobi FAST, 4")
    kept, calls = policy.decoder, []

    class Altered(type(line.parts.decoder)):
        def generate(self, *given):
            out = super().generate(*given)
            calls.append(out)
            return out if len(calls) % 2 else replace(out, ids=[[*row[:-1], row[-1] + 1] for row in out.ids])

    altered = SimpleNamespace(
        name="altered", exact=True, reference=line.reference,
        parts=SimpleNamespace(decoder=Altered(4, head="fast"), pruning=None),
    )  # fmt: skip
    flips = decode_costs._flips(policy, [line, altered], {"altered": seen[:4], line.name: seen[:4]})
    policy.decoder = kept
    assert flips["altered"] == 0.5 + flips[line.name] == 0.5


def test_time_outside_the_passes_and_flips_in_bf16_are_measured(policy, seen) -> None:
    lines = entries("greedy FAST", "jacobi FAST", "anytime FAST")
    costs = decode_costs.costs(policy, lines, seen[:3])
    for cost in costs.values():
        assert (cost.pass_ms > 0).all() and (cost.pass_ms < cost.decode_ms).all()
    assert costs["greedy FAST"].flips is None and costs["anytime FAST"].flips is None
    assert 0 <= costs["jacobi FAST"].flips <= 1 and costs["jacobi FAST"].notes["window"] >= 1
    row = bench.row(lines[1], costs, EIGHT, {})
    assert row["overhead"] > row["overhead_between"] > 0 and row["speedups"].keys() == {"greedy FAST"}


def test_flops_do_not_depend_on_where_a_pass_runs(policy, seen) -> None:
    """A one-token pass runs in numpy, where nothing counts: counting takes it to torch and back."""
    seen = seen[:1]
    parts = entries("greedy FAST")[0].parts
    first = decode_costs._flops(policy, parts, seen)
    assert first == decode_costs._flops(policy, parts, seen)
    with decode_costs._in_torch():
        there = policy.infer_batch([seen[0][0]], [seen[0][1]])[0].report.ids
    assert there == policy.infer_batch([seen[0][0]], [seen[0][1]])[0].report.ids


def test_reuse_is_counted_in_episodes_and_halves_the_cost() -> None:
    always = decode_costs.Cost(
        np.full(4, 10.0),
        np.full(4, 5.0),
        np.full(4, 4.0),
        np.full(4, 0.5),
        np.full(4, 7),
        np.full(4, 7),
        0,
        [(1,)] * 4,
        [np.zeros((2, 2))] * 4,
        1e6,
    )
    entry = decode_entries.Entry("reused", "autoregressive", ("head=fast",), "greedy FAST", "score", "flashvla")
    halved = EIGHT | {"reused": decode_costs.Pace(7.0, 0.5, (2.0,))}
    row = bench.row(entry, {"reused": always, "greedy FAST": always}, halved, {})
    assert (
        not row["exact"]
        and row["speedup"] == pytest.approx(10 / 6 * 7 / 8, abs=1e-3)
        and row["passes_per_chunk"] == 3.5
    )
    assert row["actions_per_s"] == pytest.approx(7 / 6e-3, abs=0.1) and row["flops_per_chunk"] == 500_000
    assert row["config"]["reuse"]["_target_"].endswith("ReuseRule") and row["config"]["pruning"]["drop"] is False


def test_percentiles_are_of_all_inferences_those_that_reuse_too() -> None:
    """As if the samples had been drawn: so many forwards, so many reuses."""
    rng = np.random.default_rng(0)
    forward, reused = rng.uniform(8, 12, 1000), rng.uniform(0.1, 0.3, 300)
    every = decode_costs.Cost(
        forward, forward / 2, forward / 3, forward / 9, np.full(1000, 7), np.full(1000, 7), 0, [(1,)] * 1000,
        [np.zeros((2, 2))] * 1000, 1e6,
    )  # fmt: skip
    entry = decode_entries.Entry("reused", "autoregressive", ("head=fast",), "greedy FAST", "score", "flashvla")
    costs = {"reused": every, "greedy FAST": every}
    for share, runs in ((0.6, 200), (0.25, 900), (0.03, 9700)):
        row = bench.row(entry, costs, EIGHT | {"reused": decode_costs.Pace(8.0, share, tuple(reused))}, {})
        samples = np.concatenate(
            (np.resize(forward, runs * 10), np.resize(reused, round(runs * 10 * share / (1 - share))))
        )
        for key, percent in (("p50", 50), ("p95", 95)):
            assert row["ms_per_chunk"][key] == pytest.approx(np.percentile(samples, percent), rel=0.01)
        assert row["refresh_hz"] == pytest.approx((1 - share) * 1e3 / samples.mean(), rel=0.01)  # looked at
        assert row["first_action_ms"] == row["ms_per_chunk"]
    plain = bench.row(entry, costs, EIGHT | {"reused": decode_costs.Pace(8.0)}, {})
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
    assert passes.ms == 3e3 and passes.between_ms == 20e3 and clock["now"] == 133.0


def test_a_cpu_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("synchronised"))
    with decode_costs._timed_passes(torch.device("cpu")) as passes:
        assert passes.ms == 0.0


def test_the_share_of_reuses_comes_from_the_policys_own_episodes() -> None:
    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), threads=1)
    rule = ("flashvla", "angle_deg=180", "overlap=0")  # the gripper and the cap decide alone
    parts = Parts.named({"decoder": ("autoregressive", "head=fast"), "pruning": ("score",), "reuse": rule})

    class Loose(decode_entries.Entry):
        parts = property(lambda self: parts)

    pace = decode_costs.pace(policy, Loose("loose", "autoregressive"), EvalConfig(), episodes=1)
    assert 0 < pace.reused <= 0.5  # at most every other inference
    assert 0 < sum(pace.reuse_ms) <= 5 * len(pace.reuse_ms) and policy.selection is None
    assert 4 < pace.executed < 8  # a chunk that stands again has fewer actions left


def test_further_episodes_count_in_the_place_of_the_first() -> None:
    """Two episodes, of 10 executed actions and 2 inferences each."""
    report = Report({}, tuple(replace(episode(i, True), reused=1) for i in range(2)))
    pace = decode_costs.Pace(8.0, 0.1, (1.0,)).of(report)
    assert (pace.executed, pace.reused, pace.reuse_ms) == (5.0, 0.5, (1.0,))
    assert decode_costs.Pace(8.0, 0.1).of(Report({}, (episode(1, True),))).reused == 0.1, "it does not say"


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


@pytest.fixture(scope="module")
def two_heads(tiny_dataset, tmp_path_factory):
    """A bundle with FAST tokens and a flow, not trained at all; the flow flows, as no new one does."""
    heads = {
        "fast": HeadRecipe("tokens", TokenizerRecipe("fast", 128, 5.0), 16, 32),
        "flow": HeadRecipe("flow", None, 16, 32, condition_width=8),
    }
    out = tmp_path_factory.mktemp("two-heads")
    bundle = Trainer(tiny_config(tiny_dataset, out / "run", heads=heads, look_steps=0)).bundle()
    torch.nn.init.normal_(bundle.model.heads["flow"].read.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    save(bundle, out / "bundle")
    return out / "bundle"


def test_the_command_prints_and_writes(two_heads, tmp_path, capsys) -> None:
    arguments = ["bench", "decode", "--policy", str(two_heads), "--observations", "10", "--out", str(tmp_path)]
    only = ["jacobi FAST, 4", "anytime FAST", "flow, 4 steps", "flow, 5 steps, real-time chunking"]
    assert main.main([*arguments, "--execute", "6", "--only", *only]) == 0
    out = capsys.readouterr().out
    assert "greedy FAST" in out and "jacobi FAST, 4" in out and "a pass over so many tokens" in out
    assert "not served: greedy bins" in out and "values that move: 4 of 7 (dx, dy, dz, gripper)" in out
    results = json.loads((tmp_path / "decode.json").read_text())
    rows = {row["decoder"]: row for row in results["rows"]}
    assert set(rows) == {"greedy FAST", "greedy FAST, again", *only}
    assert rows["flow, 4 steps"]["speedup"] is rows["flow, 4 steps"]["rms_to_reference"] is None
    assert rows["jacobi FAST, 4"]["agreement"] is not None and rows["flow, 4 steps"]["speedups"]["greedy FAST"] > 0
    deadlines = [cut["deadline_ms"] for cut in results["anytime"]]
    assert deadlines[0] <= rows["anytime FAST"]["config"]["deadline_ms"] <= deadlines[-1] and len(deadlines) == 9
    assert rows["flow, 5 steps, real-time chunking"]["notes"]["missed"] > 0  # a chunk was running
    assert results["noise_floor"] == {"greedy FAST": rows["greedy FAST, again"]["speedup"]}
    assert (results["execute"], results["episodes"], results["precision"]) == (6, 0, "float32")
    assert results["bundle_hash"] and results["device"] and np.isfinite(rows["greedy FAST"]["ms_per_chunk"]["p50"])
    page = (tmp_path / "decode.md").read_text().splitlines()
    tables = {titles: [line for line in page if line.count("|") == len(titles) + 1]
              for titles in (bench_decode.COSTS, bench_decode.WORK, bench_decode.ANYTIME)}  # fmt: skip
    assert [len(lines) for lines in tables.values()] == [8, 8, 11]  # titles, a rule, and the rows
    assert {"tokens/s", "Hz"} <= set(bench_decode.COSTS) and {"repaired", "agreement"} <= set(bench_decode.WORK)
    assert results["lead"] == 2 and 3 < rows["flow, 4 steps"]["executed_per_inference"] <= 7
    assert main.main([*arguments, "--execute", "99"]) == 2
    assert "the actions of a chunk, got 99" in capsys.readouterr().err
    assert main.main([*arguments, "--only", "jacobbi"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main.main([*arguments, "--only", "greedy bins"]) == 2
    assert "a line that this bundle serves" in capsys.readouterr().err


def test_hardware_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert bench_decode._hardware(torch.device("cuda:1")) == "GPU 1"
    monkeypatch.setattr(bench_decode.platform, "processor", lambda: "")
    assert bench_decode._hardware(torch.device("cpu"))


def test_success_is_drawn_against_time_and_of_capped_decoders_against_passes(tmp_path) -> None:
    names = ("greedy distilled", "capped distilled, 4 passes", "capped distilled, 8 passes")
    costs = {name: cost([(1, 2)] * 2, passes=count) for name, count in zip(names, (112, 4, 8))}
    reports = {name: Report({}, (episode(1, True), episode(2, False))) for name in names}
    rows = [bench.row(entry, costs, EIGHT, reports) for entry in entries(*names)]
    bench_decode.plot(rows[:1], tmp_path / "greedy.png")
    bench_decode.plot(rows, tmp_path / "all.png")
    assert {path.name for path in tmp_path.iterdir()} == {"greedy.png", "all.png", "all-passes.png"}
