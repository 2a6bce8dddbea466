"""What an action server makes of the goals it is sent: refused, aborted, not answered, without a result. No middleware.

Goals follow one another, each in place of the one before, so the newest word counts: a goal that was answered says that
the server is there, whatever became of those before it.
"""

from __future__ import annotations

# A server that is there answers within milliseconds; one that was killed stays in the graph for ten seconds more.
ANSWER_NS = 500_000_000
# A controller settles after the end of a trajectory; a hand says when it has closed, on something or on nothing.
SETTLE_NS = 2_000_000_000
GRIP_NS = 10_000_000_000
MOST_OPEN = 1000  # goals that wait for one thing; at 100 Hz as long as the longest limit here
_ABSENT = "no action server; is the controller running?"
# Of FollowJointTrajectory's error codes, those that no newer goal is the cause of.
_TOLERANCES = {-4: "path tolerance violated", -5: "goal tolerance violated"}


class GoalWatch:
    """Goals of one action server, numbered from 1. Times are steady nanoseconds.

    A goal that the server ends because of the next one counts as followed, whether it says cancelled or aborted; one
    that left its tolerances does not, whenever that is heard.
    """

    def __init__(self, name: str):
        self._name, self._said = name, ""
        self.sent = 0  # goals; the number of the newest
        self._aborted = 0  # the newest that was; what was sent before says nothing of the server since
        self._unanswered: dict[int, tuple[int, int]] = {}  # oldest first: until when an answer, and a result, may take
        self._running: dict[int, int] = {}  # oldest first: until when a result may take

    @property
    def open(self) -> set[int]:
        """Goals of which something is still to be heard."""
        return self._unanswered.keys() | self._running.keys()

    def send(self, now_ns: int, end_ns: int) -> int:
        """A goal goes out; its number. end_ns: when its result is there at the latest."""
        self.sent += 1
        self._unanswered[self.sent] = now_ns + ANSWER_NS, end_ns
        _bound(self._unanswered)
        return self.sent

    def absent(self) -> None:
        """Nobody is there to take a goal, and to answer for those it took."""
        self._said = _ABSENT
        self._unanswered.clear()
        self._running.clear()

    def answered(self, number: int, accepted: bool) -> None:
        _, end_ns = self._unanswered.get(number, (0, 0))
        _forget(self._unanswered, number)
        if not accepted:
            self._said = "the controller refused the goal"
            return
        if number > self._aborted:
            self._said = ""
        if end_ns:
            self._running[number] = end_ns
            _bound(self._running)

    def ended(self, number: int, aborted: bool, code: int = 0, words: str = "") -> None:
        """code, words: the driver's reason, as far as it gives one."""
        _forget(self._running, number)
        if not aborted or (number < self.sent and code not in _TOLERANCES):
            return
        why = ", ".join(filter(None, (_TOLERANCES.get(code, f"code {code}" if code else ""), words)))
        self._aborted = self.sent
        self._said = "the controller aborted the goal" + f" ({why})" * bool(why)

    def unheard(self, now_ns: int) -> bool:
        """Whether the server may not know of the newest goal: it is away, or does not answer in time."""
        answer_ns, _ = next(iter(self._unanswered.values()), (now_ns, 0))
        return self._said == _ABSENT or answer_ns < now_ns

    def fault(self, now_ns: int) -> str:
        """What is wrong with the server now, "" for nothing."""
        reason = self._said
        if not reason and self.unheard(now_ns):
            reason = f"the controller has not answered a goal for {ANSWER_NS / 1e9:g} s; does it hang?"
        elif not reason and next(iter(self._running.values()), now_ns) < now_ns:
            reason = "the controller tells no result of a goal that should be over; does it hang?"
        return f"{self._name}: {reason}" if reason else ""


def _forget(goals: dict[int, tuple[int, int]] | dict[int, int], number: int) -> None:
    """What was said of a goal holds for all before it."""
    for older in [n for n in goals if n <= number]:
        del goals[older]


def _bound(goals: dict[int, tuple[int, int]] | dict[int, int]) -> None:
    while len(goals) > MOST_OPEN:
        del goals[next(iter(goals))]
