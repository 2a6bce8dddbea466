"""When to infer, and which action is due. numpy only, no safety here (that is the Gate's).

One control slot is one action period. Per slot, in this order:

    if scheduler.should_infer(now): context = scheduler.context(now, seed); ... scheduler.submit(result, now)
    due = scheduler.due(now)

Due times are counted from what was executed: a chunk is about the observation it came from, so it starts at the index
of the first action that has not been executed since then. While the last chunk keeps running (overlap), a late chunk
therefore drops what is past; while the arm waits (no chunk left), nothing is dropped, because nothing was executed.
No latency is estimated anywhere: one slow inference delays its own chunk and changes nothing about the next.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from vla.errors import ConfigError, explain
from vla.policy import InferContext, InferResult
from vla.types import NS_PER_S, ActionChunk

# A slot's action may run this fraction of a period before or after its due time. Beyond it the action is not yet due,
# or is past. Wider than half a period on purpose: a tick grid half a period out of phase must not flap.
SLOT_TOLERANCE = 0.75
LATE_FRACTION = 0.5  # of a period; executed later than that counts as late
MAX_GAP = 16  # chunks of one sender that may be lost in a row; senders begin their numbers much further apart


@dataclass(frozen=True)
class DueAction:
    """action: float32[A], physical units. due_ns: when it should start. index: in its chunk.

    chunk_number: ever growing, never reused. stamp_ns: of the observation that the chunk came from, -1 if not known.
    """

    action: np.ndarray
    due_ns: int
    index: int
    chunk_number: int
    stamp_ns: int = -1


@dataclass
class _Request:
    """What held when an observation was asked for. executed: slots whose actions were executed since."""

    start_ns: int
    asked_ns: int
    dispensed: int
    executed: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # of an action, per slot: less than 1 while it is slowed down

    def executed_after(self, stamp_ns: int, period_ns: int) -> int:
        """Actions executed since an observation of `stamp_ns`. One that was taken later than it was asked for has seen
        what ran until then: all actions that were more than half done."""
        since = stamp_ns - period_ns // 2
        return int(sum(share for slot_ns, share in zip(self.executed, self.shares) if slot_ns > since) + 1e-6)


@dataclass
class _Active:
    """A chunk on its way out. index: next row. first: row it began with. end: one past its last usable row.

    Rows are the chunk's actions, one period each; from row `bend` on they may take `scale` times as long, `slow` then
    being what they are made of.
    """

    result: InferResult
    number: int
    start_ns: int
    index: int
    first: int
    end: int
    scale: float = 1.0
    bend: int = 0
    slow: np.ndarray | None = None

    def due_ns(self, index: int) -> int:
        return self.start_ns + index * self.result.chunk.period_ns

    def row(self, index: int) -> np.ndarray:
        return self.result.chunk.actions[index] if self.slow is None else self.slow[index - self.bend]

    def action_at(self, index: int) -> int:
        """Which action of the chunk row `index` belongs to."""
        return self.bend + int((index - self.bend) / self.scale + 1e-6)


class _ChunkScheduler:
    """State shared by both schedulers; they differ in `lead` and in what a chunk may do after `execute` actions.

    Counters: due_actions (handed out), missed_actions (slots without an action, dropped past ones included),
    late_actions (handed out more than half a period late), refused (reason -> chunks), clock_jumps.
    """

    def __init__(self, execute: int | None, lead: int, overrun: bool, max_age_s: float) -> None:
        if execute is not None and execute < 1:
            raise ConfigError(explain("execute", "at least 1 action", execute, "Execute one action per chunk or more."))
        if lead < 0 or (execute is not None and lead > execute):
            raise ConfigError(
                explain("lead", f"0 to execute ({execute})", lead, "Start inference at most one chunk ahead.")
            )
        if not max_age_s > 0:
            raise ConfigError(explain("max_age_s", "more than 0", max_age_s, "Say how old an observation may be."))
        self.execute, self.lead, self._overrun = execute, lead, overrun
        self._max_age_ns = round(max_age_s * NS_PER_S)
        self._numbers = 0  # chunk numbers are never reused, so that a Gate can tell newer from older after a reset
        self.reset(0)

    def reset(self, now_ns: int) -> None:
        """Forget chunks, requests and counters: a new episode begins at `now_ns`."""
        self._now_ns = now_ns
        self._active: _Active | None = None
        self._next: tuple[InferResult, _Request] | None = None
        self._request: _Request | None = None
        self._previous: InferResult | None = None
        self._newest_start_ns: int | None = None
        self._accepted = self._asked = 0
        self._dispensed = 0
        self._number: int | None = None  # of the sender's last accepted chunk
        self._stranger: int | None = None  # of the sender's last refused chunk
        self._waiting = False
        self._slot_ns: int | None = None  # of the last slot that had an action, or was counted as missed
        self._period_ns = 0  # of the last chunk
        self.due_actions = self.missed_actions = self.late_actions = self.clock_jumps = 0
        self.refused: Counter[str] = Counter()

    # ---- asking ----
    def should_infer(self, now_ns: int) -> bool:
        """True when an observation should go to the policy now. A request unanswered for max_age_s is asked again."""
        self._notice(now_ns)
        if self._next is not None:
            return False
        if self._request is not None and now_ns - self._request.asked_ns < self._max_age_ns:
            return False
        active = self._active
        if active is None or active.index >= active.end:
            return True
        return active.index - active.first >= self._run_length(active) - self.lead

    def context(self, now_ns: int, seed: int, stamp_ns: int | None = None) -> InferContext:
        """What the decoder needs for an observation taken at `stamp_ns` (now, if not given); notes the request.

        seed: of the episode; every request derives its own from it.
        """
        self._notice(now_ns)
        start_ns = now_ns if stamp_ns is None else stamp_ns
        self._request = _Request(start_ns, now_ns, self._dispensed)
        context = InferContext(start_ns=start_ns, seed=request_seed(seed, self._asked))
        self._asked += 1
        active = self._active
        if active is None:
            return context
        chunk, index = active.result.chunk, active.action_at(active.index)
        committed = chunk.actions[index : active.action_at(min(active.index + self.lead, active.end))]
        # Where it is slowed down, the times of its actions are those that it has from here on.
        began_ns = active.due_ns(active.index) - round(index * active.scale * chunk.period_ns)
        return InferContext(
            previous=ActionChunk(chunk.actions, began_ns, chunk.period_s * active.scale),
            executed=index,
            committed=committed.copy() if len(committed) else None,
            start_ns=start_ns,
            seed=context.seed,
        )

    def submit(self, result: InferResult, now_ns: int, number: int | None = None) -> str:
        """Offer a chunk. Returns "" when accepted, else why it was refused (also counted in `refused`).

        number: the sender's running number, when there is a sender. A number that does not follow (some of a sender's
        chunks may be lost or unwanted in between) means a second policy or a restarted one: it is refused, and a new
        sequence is adopted as soon as two of its chunks come in a row, so that a restarted policy goes on and of two
        that interleave only one is heard. After `new_sender()` whoever comes first is heard.
        """
        self._notice(now_ns)
        reason = self._refusal(result, now_ns, number)
        if reason:
            self.refused[reason] += 1
            return reason
        assert self._request is not None  # _refusal saw to it
        self._next, self._request = (result, self._request), None
        self._newest_start_ns = result.chunk.start_ns
        return ""

    def _refusal(self, result: InferResult, now_ns: int, number: int | None) -> str:
        start_ns = result.chunk.start_ns
        if number is not None:
            if not (self._number is None or _follows(number, self._number) or _follows(number, self._stranger)):
                self._stranger = number
                return "number does not follow"
            self._number, self._stranger = number, None
        if self._newest_start_ns is not None and start_ns < self._newest_start_ns:
            return "older than the current chunk"
        if self._request is None:
            return "not asked for"
        if start_ns > now_ns + result.chunk.period_ns:
            return "starts in the future"
        if now_ns - start_ns > self._max_age_ns:
            return "observation too old"
        if start_ns < self._request.start_ns:
            return "answers an earlier request"
        return ""

    def withdraw(self) -> None:
        """The open request will not be answered: the next slot may ask again, instead of after max_age_s."""
        self._request = None

    def new_sender(self) -> None:
        """The policy was away: the next chunk may come from another process, with numbers of its own."""
        self._number = self._stranger = None

    def clock_set(self, now_ns: int) -> None:
        """Time did not run on to `now_ns`: all due times are void, so everything but the counters is dropped."""
        self._now_ns = now_ns
        self.clock_jumps += 1
        self._active = self._next = self._request = self._newest_start_ns = self._slot_ns = None

    # ---- executing ----
    def due(self, now_ns: int) -> DueAction | None:
        """The action of this slot; None when there is none (`waiting` then tells early from missing)."""
        self._waiting = False
        if self._notice(now_ns):
            return None
        self._take_over(now_ns)
        active = self._active
        if active is None:
            if self._accepted:  # else the first chunk has not come: nothing is due yet
                self._miss(now_ns, 0)
            return None
        period_ns = active.result.chunk.period_ns
        tolerance_ns = round(SLOT_TOLERANCE * period_ns)
        passed = 0
        while active.index < active.end and now_ns - active.due_ns(active.index) > tolerance_ns:
            active.index += 1
            passed += 1
        self.missed_actions += passed
        if active.index >= active.end:
            self._miss(now_ns, passed)
            return None
        due_ns = active.due_ns(active.index)
        if due_ns - now_ns > tolerance_ns:
            self._waiting = True
            return None
        due = self._handed_out(active, due_ns)
        active.index += 1
        self._slot_ns = now_ns
        for request in self._requests():
            request.executed.append(now_ns)
            request.shares.append(1.0 / active.scale)
        self._dispensed += 1
        self.due_actions += 1
        self.late_actions += now_ns - due_ns > LATE_FRACTION * period_ns
        return due

    def _handed_out(self, active: _Active, due_ns: int) -> DueAction:
        index = active.index
        stamp_ns = active.result.chunk.start_ns
        return DueAction(active.row(index), due_ns, active.action_at(index), active.number, stamp_ns)

    def remaining(self) -> np.ndarray:
        """float32[N, A], the action that due() handed out last and those that follow it in its chunk."""
        active = self._active
        assert active is not None and active.index > 0
        return np.array([active.row(index) for index in range(active.index - 1, active.end)])

    def upcoming(self, count: int) -> np.ndarray:
        """float32[N <= count, A], the next actions of the chunk that runs, one per period."""
        active = self._active
        if active is None or count < 1:
            return np.empty((0, 0), np.float32)
        return np.array([active.row(index) for index in range(active.index, min(active.index + count, active.end))])

    def slow_down(self, rows: np.ndarray, factor: float) -> DueAction:
        """The chunk that due() has just begun takes `factor` times as long from this action on.

        rows: float32[M, A], what replaces `remaining()`, one row per period. All later due times move with it, and the
        actions count as executed by the share that was. Returns what is due now in place of the action handed out.
        """
        active = self._active
        assert active is not None and active.index > 0 and active.slow is None
        active.first = active.index = active.bend = active.index - 1
        active.scale, active.slow, active.end = factor, rows, active.bend + len(rows)
        due = self._handed_out(active, active.due_ns(active.index))
        active.index += 1
        for request in self._requests():
            if request.executed and request.executed[-1] == self._slot_ns:
                request.shares[-1] = 1.0 / factor
        return due

    @property
    def time_scale(self) -> float:
        """By how much the chunk that runs is slowed down; 1.0 when it is not."""
        return 1.0 if self._active is None else self._active.scale

    def _miss(self, now_ns: int, counted: int) -> None:
        """Count the slots without an action since the last one, this one included, as a stalled loop sleeps through
        several; `counted` of them are already. A tick in the same slot again is none."""
        slots = 1 if self._slot_ns is None else round((now_ns - self._slot_ns) / self._period_ns)
        if slots > 0:
            self.missed_actions += max(0, slots - counted)
            self._slot_ns = now_ns

    @property
    def waiting(self) -> bool:
        """True when the last due() came too early for the next slot: an extra tick, not a missed action."""
        return self._waiting

    @property
    def chunks(self) -> int:
        """Chunks that were taken over since reset."""
        return self._accepted

    @property
    def queue_depth(self) -> int:
        """Actions left in the chunk that runs."""
        return 0 if self._active is None else self._active.end - self._active.index

    def not_executed(self) -> None:
        """The Gate stopped the action that due() handed out last: it does not count as executed."""
        for request in self._requests():
            if request.executed and request.executed[-1] == self._slot_ns:
                request.executed.pop()
                request.shares.pop()

    def _requests(self) -> list[_Request]:
        """The open one, and that of the chunk that waits for its turn."""
        waiting = None if self._next is None else self._next[1]
        return [request for request in (self._request, waiting) if request is not None]

    def _take_over(self, now_ns: int) -> None:
        if self._next is None:
            return
        result, request = self._next
        active = self._active
        running = active is not None and active.index < active.end
        # Wait for the end of the committed actions, so that any latency up to `lead` periods gives the same motion.
        if running and self._dispensed - request.dispensed < self.lead:
            return
        self._next = None
        index = request.executed_after(result.chunk.start_ns, result.chunk.period_ns)
        if index >= len(result.chunk):
            self.refused["all actions past"] += 1
            return
        period_ns = result.chunk.period_ns
        due_ns = now_ns if active is None else active.due_ns(active.index)
        if abs(due_ns - now_ns) > SLOT_TOLERANCE * period_ns:
            due_ns = now_ns  # the last chunk ran dry a while ago: a new grid starts here
        end = (
            len(result.chunk) if self._overrun or self.execute is None else min(len(result.chunk), index + self.execute)
        )
        self._active = _Active(result, self._numbers, due_ns - index * period_ns, index, index, end)
        self._accepted += 1
        self._period_ns = period_ns
        self._numbers += 1

    def _run_length(self, active: _Active) -> int:
        room = (len(active.result.chunk) - active.first) if active.slow is None else len(active.slow)
        return room if self.execute is None else min(math.ceil(self.execute * active.scale), room)

    def _notice(self, now_ns: int) -> bool:
        """True when time ran backwards."""
        back = now_ns < self._now_ns
        if back:
            self.clock_set(now_ns)
        self._now_ns = now_ns
        return back


class SequentialScheduler(_ChunkScheduler):
    """Observe, infer, execute `execute` actions (all of the chunk by default), and only then observe again."""

    def __init__(self, execute: int | None = None, *, max_age_s: float = 1.0) -> None:
        super().__init__(execute, lead=0, overrun=False, max_age_s=max_age_s)


class OverlappedScheduler(_ChunkScheduler):
    """The next chunk is inferred while the last one runs.

    execute: actions a chunk runs before the next one takes over. lead: actions before that point at which the
    observation for the next chunk is taken; they are the context's `committed` actions. lead x period must cover the
    inference time. A chunk that comes later still is used: the last one runs on past `execute` until it is spent.
    """

    def __init__(self, execute: int = 8, lead: int = 2, *, max_age_s: float = 1.0) -> None:
        super().__init__(execute, lead, overrun=True, max_age_s=max_age_s)


Scheduler = SequentialScheduler | OverlappedScheduler


def _follows(number: int, last: int | None) -> bool:
    return last is not None and 0 < number - last <= MAX_GAP


def observed_later(context: InferContext, slots: int) -> InferContext:
    """The context for an observation that was taken `slots` control periods after it was asked for: that many of the
    committed actions are executed by then. Where none are committed the arm waits, and nothing was executed."""
    committed = context.committed
    if committed is None or slots < 1:
        return context
    slots = min(slots, len(committed))
    left = committed[slots:] if slots < len(committed) else None
    return replace(context, executed=context.executed + slots, committed=left)


def request_seed(seed: int, request: int) -> int:
    """Seed of inference number `request` of an episode, 31 bits; the same in process and over any transport."""
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, request]).generate_state(1)[0] & 0x7FFFFFFF)
