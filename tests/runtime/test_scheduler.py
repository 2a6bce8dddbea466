"""When to infer, what is due: told by the executed actions, not by hope."""

from __future__ import annotations

import numpy as np
import pytest
from arms import PERIOD_NS

from vla.errors import ConfigError
from vla.policy import DecodeReport, InferContext, InferResult
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler, observed_later, request_seed
from vla.types import ActionChunk


def chunk(start_ns: int, length: int = 12, base: float = 0.0) -> InferResult:
    """actions[i] == base + i, so that an executed action says where it came from."""
    actions = (base + np.arange(length, dtype=np.float32))[:, None]
    return InferResult(ActionChunk(actions, start_ns, 0.05), DecodeReport(ids=(7, 8, 9)))


def play(scheduler, ticks: int, latency: int, length: int = 12):
    """Executed values per tick (None: nothing was due). Chunk k holds 100 k + i, i periods after its observation."""
    out, answer, number = [], None, 0
    for tick in range(ticks):
        now = tick * PERIOD_NS
        if answer is None and scheduler.should_infer(now):
            context = scheduler.context(now, seed=3)
            answer = (tick + latency, chunk(context.start_ns, length, 100.0 * number))
            number += 1
        if answer is not None and tick >= answer[0]:
            assert scheduler.submit(answer[1], now) == ""
            answer = None
        due = scheduler.due(now)
        out.append(None if due is None else float(due.action[0]))
    return out


def test_sequential_plays_every_action_and_asks_when_none_is_left():
    scheduler = SequentialScheduler()
    assert play(scheduler, 7, latency=0, length=3) == [0, 1, 2, 100, 101, 102, 200]
    assert (scheduler.due_actions, scheduler.missed_actions, scheduler.chunks) == (7, 0, 3)


def test_sequential_executes_only_the_first_actions_when_told():
    assert play(SequentialScheduler(execute=2), 5, latency=0, length=6) == [0, 1, 100, 101, 200]


def test_sequential_drops_nothing_while_it_waits_because_nothing_was_executed():
    scheduler = SequentialScheduler()
    assert play(scheduler, 9, latency=2, length=3) == [None, None, 0, 1, 2, None, None, 100, 101]
    assert scheduler.missed_actions == 2  # the wait for the first chunk is no missed action


@pytest.mark.parametrize("latency", [0, 1, 2])
def test_overlap_gives_the_same_motion_for_any_latency_within_the_lead(latency):
    scheduler = OverlappedScheduler(execute=4, lead=2)
    values = play(scheduler, 14 + latency, latency)[latency:]
    # The observation of chunk 1 is taken before action 2; actions 2 and 3 are committed, so it begins at its index 2.
    assert values == [0, 1, 2, 3, 102, 103, 104, 105, 202, 203, 204, 205, 302, 303]
    assert scheduler.missed_actions == 0


def test_a_late_chunk_drops_what_is_past_and_the_last_one_runs_on():
    scheduler = OverlappedScheduler(execute=4, lead=2)
    values = play(scheduler, 16, latency=4)[4:]
    assert values[:10] == [0, 1, 2, 3, 4, 5, 104, 105, 106, 107]
    assert scheduler.missed_actions == 0


def test_when_the_last_chunk_runs_dry_only_executed_actions_count_as_past():
    scheduler = OverlappedScheduler(execute=4, lead=2)
    values = play(scheduler, 18, latency=7, length=6)[7:]
    # Asked before action 2, four more were executed (2..5), three slots had nothing: the next begins at index 4.
    assert values == [0, 1, 2, 3, 4, 5, None, None, None, 104, 105]
    assert scheduler.missed_actions == 3


def test_context_says_what_is_running_what_was_executed_and_what_is_committed():
    scheduler = OverlappedScheduler(execute=4, lead=2)
    first = scheduler.context(0, seed=3)
    assert (first.previous, first.committed, first.start_ns) == (None, None, 0)
    scheduler.submit(chunk(0), 0)
    for tick in range(2):
        assert not scheduler.should_infer(tick * PERIOD_NS)
        scheduler.due(tick * PERIOD_NS)
    assert scheduler.should_infer(2 * PERIOD_NS)
    context = scheduler.context(2 * PERIOD_NS, seed=3, stamp_ns=2 * PERIOD_NS - 5)
    assert context.executed == 2
    assert context.previous.start_ns == 0 and len(context.previous) == 12
    assert context.committed[:, 0].tolist() == [2.0, 3.0]
    assert context.start_ns == 2 * PERIOD_NS - 5
    assert context.seed == request_seed(3, 1) != first.seed == request_seed(3, 0)
    assert not scheduler.should_infer(3 * PERIOD_NS), "one request at a time"


def test_an_observation_taken_after_it_was_asked_for_has_seen_what_ran_until_then():
    """A camera of half the rate: asked before action 2, the image comes a period and a bit later."""
    scheduler = OverlappedScheduler(execute=4, lead=2)
    scheduler.context(0, seed=3)
    scheduler.submit(chunk(0), 0)
    for tick in range(2):
        scheduler.due(tick * PERIOD_NS)
    context = scheduler.context(2 * PERIOD_NS, seed=3)
    for tick in range(2, 5):
        assert scheduler.due(tick * PERIOD_NS).action[0] == tick
    seen_ns = 3 * PERIOD_NS + 5_000_000
    assert scheduler.submit(chunk(seen_ns, base=100), 5 * PERIOD_NS) == ""
    due = scheduler.due(5 * PERIOD_NS)
    assert due.action[0] == 102, "of the three actions since it was asked, the image had seen the first"
    assert due.stamp_ns == seen_ns and due.due_ns == 5 * PERIOD_NS
    later = observed_later(context, (seen_ns - context.start_ns + PERIOD_NS // 2) // PERIOD_NS)
    assert later.executed == 3 and later.committed[:, 0].tolist() == [3.0]
    assert observed_later(context, 0) is context
    assert observed_later(context, 9).committed is None and observed_later(context, 9).executed == 4
    waiting = InferContext(previous=context.previous, executed=12)
    assert observed_later(waiting, 3) is waiting, "where the arm waits, nothing is executed meanwhile"


@pytest.mark.parametrize("slow", [0, 3])
def test_one_slow_inference_changes_nothing_about_the_next(slow):
    """A warm-up, or a hiccup later: lead and due times are not learned from it."""
    scheduler, delays = OverlappedScheduler(execute=4, lead=2), [1] * 9
    delays[slow] = 15
    contexts, begun, answer = [], [], None
    for tick in range(60):
        now = tick * PERIOD_NS
        if answer is None and scheduler.should_infer(now) and len(contexts) < len(delays):
            contexts.append(scheduler.context(now, seed=3))
            answer = (tick + delays[len(contexts) - 1], chunk(now))
        if answer is not None and tick >= answer[0]:
            assert scheduler.submit(answer[1], now) == ""
            answer = None
        due = scheduler.due(now)
        if due is not None and (not begun or begun[-1][0] != due.chunk_number):
            begun.append((due.chunk_number, due.index))
    first = [index for _, index in begun]
    behind = slow + 1
    assert first[behind:] == [2] * (len(first) - behind) and len(first) == 9
    assert {len(context.committed) for context in contexts[behind + 1 :]} == {2}
    if slow:
        assert first[slow] == 8, "all eight actions that were left of the last chunk ran meanwhile"


def test_an_unanswered_request_is_asked_again():
    scheduler = OverlappedScheduler(max_age_s=0.5)
    scheduler.context(0, seed=0)
    assert not scheduler.should_infer(499_999_999)
    assert scheduler.should_infer(500_000_000)


def test_slots_that_a_stalled_loop_slept_through_are_missed_not_executed_late():
    scheduler = SequentialScheduler()
    scheduler.context(0, 0)
    scheduler.submit(chunk(0), 0)
    assert scheduler.due(0).index == 0
    due = scheduler.due(4 * PERIOD_NS)
    assert due.index == 4 and due.due_ns == 4 * PERIOD_NS
    assert (scheduler.due_actions, scheduler.missed_actions, scheduler.late_actions) == (2, 3, 0)


def test_a_stall_without_actions_misses_every_slot_and_a_second_tick_in_a_slot_none():
    scheduler = SequentialScheduler()
    scheduler.context(0, 0)
    scheduler.submit(chunk(0, 3), 0)
    for tick in range(3):
        assert scheduler.due(tick * PERIOD_NS) is not None
    for now, missed in ((3.0, 1), (3.2, 1), (13.2, 11), (14.0, 12), (15.0, 13)):
        assert scheduler.due(int(now * PERIOD_NS)) is None
        assert scheduler.missed_actions == missed, now
    scheduler.reset(0)
    scheduler.context(0, 0)
    scheduler.submit(chunk(0, 3), 0)
    assert scheduler.due(0) is not None and scheduler.due(20 * PERIOD_NS) is None
    assert scheduler.missed_actions == 20, "two of the chunk, and all that it did not reach"


def test_jittered_ticks_neither_skip_nor_repeat():
    rng = np.random.default_rng(0)
    scheduler = SequentialScheduler()
    scheduler.context(0, 0)
    scheduler.submit(chunk(0, 200), 0)
    times = [0] + [int((k + rng.uniform(-0.3, 0.3)) * PERIOD_NS) for k in range(1, 200)]
    assert [scheduler.due(t).index for t in times] == list(range(200))


def test_late_is_counted_and_an_extra_tick_is_not_a_missed_one():
    scheduler = SequentialScheduler()
    scheduler.context(0, 0)
    scheduler.submit(chunk(0), 0)
    scheduler.due(0)
    assert scheduler.due(5_000_000) is None and scheduler.waiting
    assert scheduler.due(PERIOD_NS + 30_000_000).index == 1
    assert (scheduler.late_actions, scheduler.missed_actions) == (1, 0)


def test_a_stopped_action_does_not_count_as_executed():
    scheduler = OverlappedScheduler(execute=4, lead=2)
    scheduler.context(0, 0)
    scheduler.submit(chunk(0), 0)
    for tick in range(2):
        scheduler.due(tick * PERIOD_NS)
    context = scheduler.context(2 * PERIOD_NS, 0)
    for tick in (2, 3):
        scheduler.due(tick * PERIOD_NS)
        scheduler.not_executed()
    scheduler.submit(chunk(context.start_ns, base=100), 3 * PERIOD_NS)
    due = scheduler.due(4 * PERIOD_NS)
    assert due.action[0] == 100 and due.due_ns == 4 * PERIOD_NS


def test_refused_chunks_say_why():
    scheduler = OverlappedScheduler(max_age_s=1.0)
    second = 1_000_000_000
    assert scheduler.submit(chunk(0), 0) == "not asked for"
    scheduler.context(5 * second, 0)
    assert scheduler.submit(chunk(6 * second), 5 * second) == "starts in the future"
    assert scheduler.submit(chunk(3 * second), 5 * second) == "observation too old"
    assert scheduler.submit(chunk(5 * second - PERIOD_NS), 5 * second) == "answers an earlier request"
    assert scheduler.submit(chunk(5 * second), 5 * second) == ""
    scheduler.due(5 * second)
    scheduler.context(5 * second + PERIOD_NS, 0)
    assert scheduler.submit(chunk(4 * second), 5 * second + PERIOD_NS) == "older than the current chunk"
    assert sum(scheduler.refused.values()) == 5


def test_a_chunk_whose_actions_are_all_past_is_refused():
    scheduler = OverlappedScheduler(execute=4, lead=2)
    values = play(scheduler, 12, latency=0, length=12)
    assert None not in values
    now = 12 * PERIOD_NS
    scheduler.reset(now)
    scheduler.context(now, 0)
    scheduler.submit(chunk(now, 12), now)
    scheduler.due(now)
    context = scheduler.context(now + PERIOD_NS, 0)
    for tick in range(1, 5):
        scheduler.due(now + tick * PERIOD_NS)
    scheduler.submit(chunk(context.start_ns, 3, 100), now + 5 * PERIOD_NS)
    assert scheduler.due(now + 5 * PERIOD_NS).action[0] == 5
    assert scheduler.refused["all actions past"] == 1


def offer(scheduler, number: int, now: int) -> str:
    scheduler.context(now, 0)
    return scheduler.submit(chunk(now), now, number)


def test_of_two_policies_only_one_is_heard_and_a_restarted_one_goes_on():
    scheduler = OverlappedScheduler()
    assert offer(scheduler, 5, 0) == ""
    assert offer(scheduler, 41, 1) == "number does not follow"
    assert offer(scheduler, 6, 2) == ""
    assert offer(scheduler, 42, 3) == "number does not follow", "the first policy still answers"
    assert offer(scheduler, 7, 4) == ""
    assert offer(scheduler, 0, 5) == "number does not follow"
    assert offer(scheduler, 1, 6) == "", "two in a row: the policy was restarted"


def test_lost_chunks_of_one_sender_do_not_make_it_a_stranger():
    scheduler = OverlappedScheduler()
    assert offer(scheduler, 5, 0) == "" == offer(scheduler, 9, 1)
    assert offer(scheduler, 9, 2) == offer(scheduler, 8, 3) == "number does not follow"


def test_after_a_silence_the_request_is_withdrawn_and_a_new_sender_heard_at_once():
    scheduler = OverlappedScheduler()
    assert offer(scheduler, 5000, 0) == ""
    for tick in range(8):
        scheduler.due(tick * PERIOD_NS)
    assert scheduler.should_infer(7 * PERIOD_NS)
    scheduler.context(7 * PERIOD_NS, 0)
    assert not scheduler.should_infer(8 * PERIOD_NS)
    scheduler.withdraw()
    assert scheduler.should_infer(8 * PERIOD_NS)
    assert scheduler.submit(chunk(8 * PERIOD_NS), 8 * PERIOD_NS, 5001) == "not asked for"
    scheduler.new_sender()
    assert offer(scheduler, 0, 8 * PERIOD_NS) == ""


def test_a_clock_that_jumps_back_voids_every_due_time():
    scheduler = OverlappedScheduler()
    second = 1_000_000_000
    scheduler.context(10 * second, 0)
    scheduler.submit(chunk(10 * second), 10 * second)
    assert scheduler.due(10 * second) is not None
    assert scheduler.due(second) is None
    assert scheduler.clock_jumps == 1 and scheduler.queue_depth == 0
    assert scheduler.should_infer(second)
    scheduler.context(second, 0)
    assert scheduler.submit(chunk(second), second) == ""
    assert scheduler.due(second).index == 0


def test_chunk_numbers_are_never_reused():
    scheduler = SequentialScheduler()
    numbers = []
    for _ in range(2):
        scheduler.reset(0)
        scheduler.context(0, 0)
        scheduler.submit(chunk(0), 0)
        numbers.append(scheduler.due(0).chunk_number)
    assert numbers == [0, 1] and scheduler.chunks == 1


@pytest.mark.parametrize("arguments", [{"execute": 0}, {"execute": 2, "lead": 3}, {"lead": -1}, {"max_age_s": 0.0}])
def test_settings_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigError):
        OverlappedScheduler(**arguments)
