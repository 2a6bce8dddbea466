"""What is known of an action server by what it says of its goals, and by what it does not say."""

from __future__ import annotations

import pytest

from ros_nodes import goals
from ros_nodes.goals import ANSWER_NS, SETTLE_NS, GoalWatch

MS = 1_000_000
SILENT, ENDLESS = "/arm: the controller has not answered a goal for 0.5 s", "/arm: the controller tells no result"


class Server:
    """A controller that is sent a goal of 100 ms every 50 ms. answers, ends: what it still does."""

    def __init__(self) -> None:
        self.watch, self.now_ns = GoalWatch("/arm"), 10**12
        self.answers = self.ends = True

    def run(self, milliseconds: int) -> Server:
        for _ in range(milliseconds // 50):
            number = self.watch.send(self.now_ns, self.now_ns + 100 * MS + SETTLE_NS)
            self.now_ns += 10 * MS
            if self.answers:
                self.watch.answered(number, accepted=True)
            if self.answers and self.ends and number > 1:  # the one before makes way
                self.watch.ended(number - 1, aborted=False)
            self.now_ns += 40 * MS
        return self

    @property
    def fault(self) -> str:
        return self.watch.fault(self.now_ns)


def test_a_server_that_follows_has_no_fault_and_nothing_piles_up() -> None:
    server = Server().run(60_000)
    assert not server.fault and server.watch.open == {server.watch.sent}


def test_goals_that_are_not_answered_are_noticed_at_the_limit_and_until_one_is() -> None:
    server = Server().run(1000)
    server.answers, begin_ns = False, server.now_ns
    while not server.fault:
        server.run(50)
    assert server.fault.startswith(SILENT) and server.watch.unheard(server.now_ns)
    assert ANSWER_NS < server.now_ns - begin_ns <= ANSWER_NS + 50 * MS
    server.run(10_000)
    assert server.fault.startswith(SILENT)
    server.watch.answered(server.watch.sent - 3, accepted=True)  # slow, but there
    assert not server.watch.unheard(server.now_ns)
    server.answers = True
    assert not server.run(100).fault


def test_results_that_do_not_come_are_noticed_long_after_the_trajectory_and_until_one_does() -> None:
    server = Server().run(1000)
    server.ends, begin_ns = False, server.now_ns
    while not server.fault:
        server.run(50)
    assert server.fault.startswith(ENDLESS) and not server.watch.unheard(server.now_ns)
    assert SETTLE_NS < server.now_ns - begin_ns <= SETTLE_NS + 200 * MS
    server.run(1000)
    assert server.fault.startswith(ENDLESS), "goals that are taken do not hide it"
    server.watch.ended(server.watch.sent - 1, aborted=False)
    assert not server.fault


def test_the_last_goal_of_an_episode_is_waited_for_as_well() -> None:
    server = Server().run(1000)
    server.now_ns += SETTLE_NS + 200 * MS
    assert server.fault.startswith(ENDLESS)
    server.watch.ended(server.watch.sent, aborted=False)
    assert not server.fault


def test_a_server_that_went_away_owes_nothing_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server().run(1000)
    server.answers = False
    server.run(400)
    server.watch.absent()
    assert "no action server" in server.fault and server.watch.unheard(server.now_ns) and not server.watch.open
    server.answers = True
    server.run(50)
    server.now_ns += ANSWER_NS
    assert not server.fault


def test_what_is_open_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "MOST_OPEN", 60)  # 3 s
    server = Server()
    server.ends = False
    server.run(10_000)
    assert len(server.watch.open) == 60 and server.fault.startswith(ENDLESS)
    server.answers = False
    server.run(10_000)
    assert len(server.watch.open) == 120 and server.fault.startswith(SILENT)


def test_a_goal_that_ends_for_the_next_one_was_followed() -> None:
    """Some drivers call that an abort; what left its tolerances counts, even when a newer goal is on its way."""
    watch, now_ns = GoalWatch("/arm/follow"), 10**12

    def taken() -> int:
        number = watch.send(now_ns, now_ns + SETTLE_NS)
        watch.answered(number, accepted=True)
        return number

    first, second, third = taken(), taken(), taken()
    watch.ended(first, aborted=False)
    watch.ended(second, aborted=True, code=-1)
    assert not watch.fault(now_ns)
    watch.ended(third, aborted=True)
    assert watch.fault(now_ns) == "/arm/follow: the controller aborted the goal"
    watch.answered(third, accepted=True)  # sent before that was known
    assert watch.fault(now_ns)
    fourth = taken()
    assert not watch.fault(now_ns)
    taken()
    watch.ended(fourth, aborted=True, code=-4, words="joint1")
    assert watch.fault(now_ns) == "/arm/follow: the controller aborted the goal (path tolerance violated, joint1)"
    watch.answered(watch.send(now_ns, now_ns), accepted=False)
    assert watch.fault(now_ns) == "/arm/follow: the controller refused the goal"
