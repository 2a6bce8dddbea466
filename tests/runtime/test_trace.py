"""The trace and the summary made of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from arms import PERIOD_NS, DeltaSolver, NumberArm, arm
from mcap.reader import make_reader

from policies.hold import ScriptedPolicy
from vla.errors import ConfigError, DataError
from vla.policy import DecodeReport
from vla.runtime.gate import Decision, Gate, Reason, Verdict
from vla.runtime.loop import ControlLoop, run_episode
from vla.runtime.scheduler import DueAction, OverlappedScheduler, SequentialScheduler
from vla.runtime.summary import control_hz, gate_counts, late_actions, stop_reasons, summarize, wilson_95
from vla.runtime.trace import EpisodeRow, Trace

COLUMNS = (
    "tick_ns", "due_ns", "action", "command", "measured", "verdict", "reason", "chunk", "index", "stamp_ns", "late_ns",
)  # fmt: skip
INFERENCE = (
    "infer_stamp_ns", "infer_start_ns", "infer_end_ns", "infer_ms", "infer_passes", "infer_repaired", "infer_accepted",
    "infer_confidence", "infer_reused",
)  # fmt: skip


@pytest.fixture
def recorded() -> Trace:
    embodiment = arm()
    trace = Trace(embodiment, 500)
    loop = ControlLoop(embodiment, SequentialScheduler(), Gate(embodiment), DeltaSolver(), trace)
    actions = np.zeros((12, 4), np.float32)
    actions[:, 0] = 0.02
    for seed in (1, 2):
        run_episode(NumberArm(embodiment), ScriptedPolicy(embodiment, [actions]), loop, seed, latency_s=0.1)
    trace.add_image("agentview", 0, b"\xff\xd8jpeg", "jpeg")
    return trace


def test_a_trace_comes_back_from_its_file_as_it_was(recorded, tmp_path):
    path = recorded.save_mcap(tmp_path / "runs" / "trace.mcap")
    loaded = Trace.load_mcap(path)
    assert loaded.rows == recorded.rows and loaded.inferences == recorded.inferences
    for name in COLUMNS:
        np.testing.assert_array_equal(
            getattr(loaded, name)[: loaded.rows], getattr(recorded, name)[: recorded.rows], name
        )
    for name in INFERENCE:
        mine, theirs = getattr(recorded, name)[: recorded.inferences], getattr(loaded, name)[: loaded.inferences]
        np.testing.assert_array_equal(theirs, mine, name)
    assert loaded.episodes == recorded.episodes and loaded.images == recorded.images
    assert loaded.embodiment == recorded.embodiment
    assert summarize(loaded) == summarize(recorded)
    assert [p.name for p in path.parent.iterdir()] == ["trace.mcap"], "no temporary file is left"


def test_every_action_tells_the_observation_it_came_from(recorded):
    done = recorded.chunk[: recorded.rows] >= 0
    stamps = recorded.stamp_ns[: recorded.rows]
    assert set(stamps[done]) == set(recorded.infer_stamp_ns[: recorded.inferences]) and np.all(stamps[~done] == -1)
    # Two slots of waiting, then one action per slot: the first is two periods old, the twelfth thirteen.
    ages = (recorded.tick_ns[: recorded.rows] - stamps)[done] // PERIOD_NS
    assert ages[:12].tolist() == list(range(2, 14))


def test_traces_without_observation_stamps_are_read_as_not_knowing_them(recorded, tmp_path, monkeypatch):
    whole = Trace._messages

    def without(self):
        for stamp, topic, body in whole(self):
            yield stamp, topic, {key: value for key, value in body.items() if key != "stamp_ns" or "episode" in topic}

    monkeypatch.setattr(Trace, "_messages", without)
    loaded = Trace.load_mcap(recorded.save_mcap(tmp_path / "trace.mcap"))
    assert loaded.rows == recorded.rows and np.all(loaded.stamp_ns[: loaded.rows] == -1)
    assert np.all(loaded.infer_stamp_ns[: loaded.inferences] == -1)


def test_what_a_decoder_told_is_kept_per_inference(recorded, tmp_path):
    told = [{"averaged": 1.0, "confidence": 0.975}, {"moved": float("nan")}]
    for notes in told:
        recorded.inference(10**12, 10**12, 1.0, DecodeReport(notes=notes))
    loaded = Trace.load_mcap(recorded.save_mcap(tmp_path / "trace.mcap"))
    assert loaded.infer_notes[loaded.inferences - 2] == told[0] and loaded.infer_notes[0] == {}
    assert np.isnan(loaded.infer_notes[loaded.inferences - 1]["moved"])


def test_every_reuse_is_kept_with_its_reason_and_older_traces_have_none(recorded, tmp_path, monkeypatch):
    why = "angle 3.0 deg below 10, overlap 0.90 above 0.7"
    recorded.inference(10**12, 10**12, 1.0, DecodeReport(confidence=0.25, reused=why))
    recorded.inference(10**12, 10**12, 1.0)
    path, last = recorded.save_mcap(tmp_path / "trace.mcap"), slice(recorded.inferences - 3, recorded.inferences)
    loaded = Trace.load_mcap(path)
    assert loaded.infer_reused[last] == ["", why, ""]
    np.testing.assert_array_equal(loaded.infer_confidence[last], [1.0, 0.25, np.nan])
    whole = Trace._inference_message

    def without(self, row):
        return {key: value for key, value in whole(self, row).items() if key not in ("confidence", "notes", "reused")}

    monkeypatch.setattr(Trace, "_inference_message", without)
    older = Trace.load_mcap(recorded.save_mcap(tmp_path / "older.mcap"))
    assert older.inferences == recorded.inferences and set(older.infer_reused[: older.inferences]) == {""}
    assert np.isnan(older.infer_confidence).all()


def test_a_cleared_trace_begins_anew(recorded):
    recorded.clear()
    assert (recorded.rows, recorded.inferences, recorded.episodes, recorded.images) == (0, 0, [], [])
    recorded.begin(5)
    recorded.tick(5, None, Decision(Verdict.PASS, Reason.NONE, np.zeros(4)), np.zeros(4), 0, 1.0)
    assert recorded.tick_ns[0] == 5 and recorded.stamp_ns[0] == -1, "nothing of the last episode is left"


def test_the_file_has_a_schema_per_topic_and_times_that_never_run_back(recorded, tmp_path):
    path = recorded.save_mcap(tmp_path / "trace.mcap")
    topics, times = {}, []
    with path.open("rb") as stream:
        for schema, channel, message in make_reader(stream).iter_messages(log_time_order=False):
            topics[channel.topic] = schema.name
            times.append(message.log_time)
            body, properties = json.loads(message.data), json.loads(schema.data)["properties"]
            assert schema.encoding == "jsonschema" and channel.message_encoding == "json"
            assert set(body) == set(properties), channel.topic
            assert body["timestamp"]["sec"] * 10**9 + body["timestamp"]["nsec"] == message.log_time
    assert times == sorted(times)
    assert topics == {
        "/vla/action": "vla.Action",
        "/vla/command": "vla.JointVector",
        "/vla/joint_states": "vla.JointVector",
        "/vla/gate": "vla.Gate",
        "/vla/inference": "vla.Inference",
        "/vla/episode": "vla.Episode",
        "/vla/images/agentview": "foxglove.CompressedImage",
    }


def test_damaged_and_foreign_files_are_refused_by_name(recorded, tmp_path):
    path = recorded.save_mcap(tmp_path / "trace.mcap")
    whole = path.read_bytes()
    for name, data in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"no mcap at all"}.items():
        broken = tmp_path / f"{name}.mcap"
        broken.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.mcap"):
            Trace.load_mcap(broken)
    with pytest.raises(DataError, match="no such file"):
        Trace.load_mcap(tmp_path / "none.mcap")


def test_a_full_trace_drops_rows_and_says_so():
    trace = Trace(arm(), capacity=2, inference_capacity=1)
    decision = Decision(Verdict.PASS, Reason.NONE, np.zeros(4))
    for tick in range(5):
        trace.tick(tick, None, decision, np.zeros(4), 0, 1.0)
        trace.inference(0, 1, 1.0)
    assert (trace.rows, trace.inferences, trace.dropped_rows) == (2, 1, 7)
    with pytest.raises(ConfigError, match="capacity"):
        Trace(arm(), capacity=0)


def test_a_row_survives_inputs_of_a_wrong_shape():
    trace = Trace(arm(), capacity=2)
    due = DueAction(np.zeros(3, np.float32), 0, 0, 0)
    trace.tick(0, due, Decision(Verdict.STOP, Reason.ACTION_INVALID, np.zeros(4)), np.zeros(2), 0, 1.0)
    assert np.all(np.isnan(trace.action[0])) and np.all(np.isnan(trace.measured[0]))


def test_the_summary_has_the_keys_of_summary_json_and_counts_by_hand(recorded):
    summary = summarize(recorded, transport_ms=[1.0, 3.0], peak_rss_mb=12.5, bundle_hash="abc")
    assert list(summary) == [
        "episodes", "successes", "success_rate", "wilson_95", "control_hz", "due_actions", "missed_actions",
        "inference_ms", "transport_ms", "peak_rss_mb", "gate", "seeds", "bundle_hash",
    ]  # fmt: skip
    assert (summary["episodes"], summary["successes"], summary["seeds"]) == (2, 2, [1, 2])
    assert summary["control_hz"] == 20.0
    # Each episode: two slots of waiting (not counted), twelve actions, two missed while inferring, then the rest.
    assert summary["missed_actions"] == 4
    assert summary["due_actions"] == sum(summary["gate"].values()) == recorded.rows - 4
    assert summary["gate"] == gate_counts(recorded) and summary["gate"]["stop"] == 4
    assert stop_reasons(recorded)["no action is due"] == 4
    assert summary["transport_ms"] == {"p50": 2.0, "p95": 2.9} and set(summary["inference_ms"]) == {"p50", "p95", "p99"}
    json.dumps(summary, allow_nan=False)


def test_an_empty_run_has_a_summary_too():
    summary = summarize(Trace(arm(), 4))
    assert summary["success_rate"] is None and summary["control_hz"] is None and summary["wilson_95"] == [0.0, 1.0]
    json.dumps(summary, allow_nan=False)


def test_rates_and_lateness_are_of_the_ticks_themselves():
    trace = Trace(arm(), 100)
    decision = Decision(Verdict.PASS, Reason.NONE, np.zeros(4))
    for tick in range(20):
        late = 30_000_000 if tick % 5 == 0 else 0
        due = DueAction(np.zeros(4, np.float32), tick * PERIOD_NS, tick, 0)
        trace.tick(tick * PERIOD_NS + late, due, decision, np.zeros(4), 0, 1.0)
    assert late_actions(trace) == 4
    assert control_hz(trace) == pytest.approx(20.0, rel=0.05)


def test_a_stall_lowers_the_rate_and_a_pause_between_episodes_does_not():
    trace, second = Trace(arm(), 100), 20
    decision = Decision(Verdict.STOP, Reason.NO_ACTION, np.zeros(4))
    for tick in (*range(second), *range(5 * second, 6 * second)):
        trace.tick(tick * PERIOD_NS, None, decision, np.zeros(4), 0, 1.0)
    assert control_hz(trace) == pytest.approx(39 / 5.95, rel=1e-3)
    trace.add_episode(EpisodeRow(1, "push", "push it", True, second, second * PERIOD_NS))
    assert control_hz(trace) == 20.0


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718))
    for successes, trials, low, high in published:
        assert wilson_95(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_recording_a_tick_reallocates_nothing():
    trace = Trace(arm(), 100)
    before = [getattr(trace, name).__array_interface__["data"][0] for name in COLUMNS]
    loop = ControlLoop(arm(), OverlappedScheduler(), Gate(arm()), DeltaSolver(), trace)
    loop.reset(np.array([0.0, 0, 1, 0.04]), 0)
    for tick in range(99):
        loop.tick(tick * PERIOD_NS, None, None, None)
    assert trace.rows == 99
    assert [getattr(trace, name).__array_interface__["data"][0] for name in COLUMNS] == before


def test_episode_stamps_follow_each_other_although_simulated_clocks_restart(recorded):
    assert np.all(np.diff(recorded.tick_ns[: recorded.rows]) > 0)
    first, second = recorded.episodes
    assert isinstance(first, EpisodeRow) and first.stamp_ns < second.stamp_ns
