"""Action reuse: the rule lets go, the memory holds real forwards only, and a reused chunk keeps its due times."""

import itertools

import numpy as np
import pytest

from policies.reuse_policy import ReusePolicy
from policies.vla_policy import VlaPolicy
from tests.decoding.test_continuous import bundle_of
from vla.configs import build, load
from vla.decoding.reuse import Forward, ReuseMemory, ReuseRule, angle_deg, gripper_moves, overlap
from vla.embodiment import Camera, Embodiment, Joint
from vla.errors import ConfigError, ObservationError
from vla.models.heads import HeadConfig
from vla.models.pruning import TokenSelection
from vla.policy import DecodeReport, InferContext, InferResult, Policy, infer
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler
from vla.types import ActionChunk, ControlMode, Observation

ROBOT = Embodiment(
    "toy", 20, "osc_delta", ("dx", "dy", "gripper"), ("m", "m", "1"), ("x", "y", "z"), "none", 1,
    ControlMode.OSC_DELTA, (Camera("front", 32, 32),),
)  # fmt: skip
PERIOD_NS = 50_000_000
TOKENS = np.arange(10)


def chunk(dx: float, dy: float, gripper=1.0, count: int = 16) -> np.ndarray:
    return np.tile(np.array([dx, dy, gripper], np.float32), (count, 1))


def forward(dx: float = 1.0, dy: float = 0.0, gripper=1.0, tokens=TOKENS) -> Forward:
    return Forward.of(chunk(dx, dy, gripper), tokens, ROBOT)


# ---- the rule ----
@pytest.mark.parametrize(
    ("motion", "expected"),
    [((1, 0), 0), ((0, 1), 90), ((-3, 0), 180), ((2, 2), 45), ((1e-7, 0), None), ((0, 0), None)],
)
def test_angles_are_those_of_the_motion_and_an_arm_that_stands_has_none(motion, expected) -> None:
    angle = angle_deg(forward(), forward(*motion, gripper=-1.0))
    assert angle is expected or angle == pytest.approx(expected, abs=1e-4)
    assert ReuseRule(angle_deg=180, overlap=0).similar(forward(), forward(0, 0)) == ""


def test_absolute_goals_have_the_direction_of_their_way() -> None:
    """Two poses nearly the same, reached from opposite sides: as vectors their angle is small."""
    robot = Embodiment(
        "toy", 20, "joint_position", ("a", "b", "gripper"), ("rad", "rad", "m"), ("a", "b", "gripper"), "none", 1,
        ControlMode.JOINT_POSITION, (), (*(Joint(n, -2, 2, 1, 1) for n in "ab"), Joint("finger", 0.0, 0.08, 1, 1)),
    )  # fmt: skip
    there = np.linspace((1.0, 1.0, 0.03), (1.1, 1.0, 0.05), 8)
    one, other = (Forward.of(actions, TOKENS, robot) for actions in (there, there[::-1]))
    assert angle_deg(one, other) == pytest.approx(180) and angle_deg(one, one) == pytest.approx(0)
    assert one.gripper[:, 0].tolist() == [False] * 4 + [True] * 4  # the middle of its range, not zero


def test_overlap_is_the_share_of_the_newer_tokens() -> None:
    few, many = forward(tokens=np.array([3, 4])), forward(tokens=np.array([4, 5, 6, 7]))
    assert (overlap(few, many), overlap(many, few)) == (0.25, 0.5)
    assert overlap(few, forward(tokens=np.array([], int))) == 0


def test_both_conditions_are_needed_and_strict() -> None:
    rule = ReuseRule(angle_deg=45.5, overlap=0.5)
    other, half = np.arange(5, 15), np.arange(4, 14)
    assert rule.similar(forward(), forward(1, 1, tokens=half)) == "angle 45.0 deg below 45.5, overlap 0.60 above 0.5"
    assert rule.similar(forward(), forward(1, 1, tokens=other)) == ""  # 0.5 is not above 0.5
    assert rule.similar(forward(), forward(1, 1.1)) == ""


@pytest.mark.parametrize("where", ["between", "inside the older", "inside the newer", "at the end"])
def test_a_gripper_that_moves_forces_a_forward(where) -> None:
    sides = {
        "between": (np.ones(16), -np.ones(16)),
        "inside the older": (np.r_[-np.ones(3), np.ones(13)], np.ones(16)),
        "inside the newer": (np.ones(16), np.r_[np.ones(8), -np.ones(4), np.ones(4)]),
        "at the end": (np.ones(16), np.r_[np.ones(15), -1]),
    }[where]
    memory, still = ReuseMemory(ReuseRule()), ReuseMemory(ReuseRule())
    for gripper in sides:
        actions = chunk(1, 0)
        actions[:, 2] = gripper
        memory.ran(Forward.of(actions, TOKENS, ROBOT))
        still.ran(forward())
    assert gripper_moves(*memory._forwards) and memory.reason(16) == ""
    assert still.reason(16) != ""


@pytest.mark.parametrize(
    ("flip", "left", "committed", "ahead", "reused"),
    [
        (8, 14, 0, 6, True),  # actions 2 to 7: the gripper changes with the next one
        (8, 14, 0, 7, False),
        (8, 14, 2, 4, True),
        (8, 14, 2, 5, False),
        (8, 8, 0, 2, False),  # it is changing now, from the action that ran last
        (8, 7, 0, 4, True),  # and has changed
        (8, 14, 0, 0, False),  # anywhere
    ],
)
def test_a_gripper_counts_as_far_ahead_as_asked(flip, left, committed, ahead, reused) -> None:
    memory = ReuseMemory(ReuseRule(ahead=ahead))
    actions = chunk(1, 0)
    actions[flip:, 2] = -1.0
    memory.ran(forward())
    memory.ran(Forward.of(actions, TOKENS, ROBOT))
    assert bool(memory.reason(left, committed)) == reused
    memory.reused()
    assert memory.reason(left, committed) == ""


def test_the_published_rule_locks_itself_on_and_the_memory_does_not() -> None:
    """A world that turns around after the third step: the ungated rule never sees it."""
    world = [forward()] * 3 + [forward(-1, 0, tokens=TOKENS + 50)] * 20
    rule = ReuseRule()
    seen, published = list(world[:2]), []
    for step in world[2:]:  # the trigger as it is printed: each step refreshes the memory, reused or not
        reused = bool(rule.similar(*seen[-2:]))
        published.append(reused)
        seen.append(seen[-1] if reused else step)
    assert all(published)

    memory, ours = ReuseMemory(rule), []
    for step in world:
        reused = bool(memory.reason(16))
        ours.append(reused)
        memory.reused() if reused else memory.ran(step)
    assert ours[:6] == [False, False, True, False, False, True]  # the turn seen at once, then the way back is steady
    assert not any(a and b for a, b in itertools.pairwise(ours))


@pytest.mark.parametrize("most", [1, 2, 5])
def test_reuses_in_a_row_are_capped_under_any_stream(most) -> None:
    rng, memory, row, longest = np.random.default_rng(most), ReuseMemory(ReuseRule(most=most)), 0, 0
    for _ in range(300):
        if memory.reason(16):
            memory.reused()
            row += 1
        else:
            memory.ran(forward(1, rng.choice([0, 0, 0, 1])))
            row = 0
        longest = max(longest, row)
    assert longest == most


@pytest.mark.parametrize(
    ("left", "committed", "reused"),
    [(4, 0, True), (3, 0, False), (0, 0, False), (6, 2, True), (5, 2, False), (13, 6, True), (12, 6, False)],
)
def test_enough_actions_must_be_left_to_hide_the_next_inference(left, committed, reused) -> None:
    memory = ReuseMemory(ReuseRule(least=4))
    memory.ran(forward())
    assert memory.reason(left, committed) == ""  # one forward is no direction
    memory.ran(forward())
    assert bool(memory.reason(left, committed)) == reused


def test_settings_out_of_range_are_refused() -> None:
    for changes in ({"angle_deg": 0}, {"overlap": 1}, {"most": 0}, {"least": 0}, {"ahead": -1}):
        with pytest.raises(ConfigError, match=rf"reuse\.{next(iter(changes))}"):
            ReuseRule(**changes)
    assert load("reuse", "flashvla") == ReuseRule()


# ---- the policy ----
class Slots:
    """A policy whose action says when it is due: dx is the number of its slot. Keeps which it was asked."""

    embodiment, horizon = ROBOT, 16

    def __init__(self, tokens=TOKENS):
        self.tokens, self.asked = tokens, []

    def reset(self, seed: int) -> None: ...

    def infer_batch(self, observations, contexts):
        self.asked.append([observation.stamp_ns // PERIOD_NS for observation in observations])
        results = []
        for context in contexts:
            actions = chunk(0, 0)
            actions[:, 0] = context.start_ns / PERIOD_NS + np.arange(16)
            results.append(
                InferResult(ActionChunk(actions, context.start_ns, 0.05), DecodeReport(kept_tokens=self.tokens))
            )
        return results


def observation(slot: int = 1, instruction: str = "push") -> Observation:
    return Observation({}, np.zeros(3, np.float32), instruction, slot * PERIOD_NS)


def scheduled(policy, late: int, begin: int, told):
    """60 slots from `begin` on, four executed actions per chunk, each `late` slots after its observation. told: called
    with every result. Returns the scheduler, and (slot, first value of the action) of what ran."""
    scheduler = OverlappedScheduler(4, late, max_age_s=10) if late else SequentialScheduler(4, max_age_s=10)
    arriving, executed = [], []
    scheduler.reset(begin * PERIOD_NS)
    for slot in range(begin, begin + 60):
        now = slot * PERIOD_NS
        if scheduler.should_infer(now):
            result = infer(policy, observation(slot), scheduler.context(now, 0))
            told(result)
            arriving.append((slot + late, result))
        while arriving and arriving[0][0] <= slot:
            assert scheduler.submit(arriving.pop(0)[1], now) == ""
        due = scheduler.due(now)
        if due is not None:
            executed.append((slot, float(due.action[0])))
    return scheduler, executed


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_every_action_runs_in_its_slot_whatever_is_reused(most, late) -> None:
    """Executed through the real schedulers, with chunks that come `late` slots after their observation."""
    inner, begin, reports = Slots(), 7, []
    policy = ReusePolicy(inner, ReuseRule(most=most, least=2))
    assert isinstance(policy, Policy)
    scheduler, executed = scheduled(policy, late, begin, lambda result: reports.append(result.report.reused))
    assert [slot for slot, _ in executed] == list(range(begin + late, begin + 60))
    # while the first chunk is on its way the arm waits, and its actions wait with it
    second = begin + 4 + late
    assert all(said == (slot - late if slot < second else slot) for slot, said in executed)
    assert scheduler.missed_actions == 0 and not scheduler.refused
    runs = "".join("r" if reused else "f" for reused in reports)
    assert "r" * min(most, 2) in runs and "r" * (min(most, 3) + 1) not in runs  # 16 actions: three reuses of four


def context_after(result: InferResult, executed: int = 4, **changes) -> InferContext:
    start_ns = result.chunk.due_ns(executed)
    return InferContext(previous=result.chunk, executed=executed, start_ns=start_ns, **changes)


def twice(policy) -> InferResult:
    """Two real forwards in a row; the last result."""
    policy.reset(0)
    first = infer(policy, observation(), InferContext(start_ns=PERIOD_NS))
    return infer(policy, observation(), context_after(first))


def test_a_reused_chunk_is_what_is_left_and_says_why() -> None:
    inner = Slots()
    policy = ReusePolicy(inner)
    last = twice(policy)
    context = context_after(last, 5)
    again = infer(policy, observation(10), context)
    np.testing.assert_array_equal(again.chunk.actions, last.chunk.actions[5:])
    assert again.chunk.start_ns == context.start_ns and again.chunk.period_s == last.chunk.period_s
    assert again.report.reused == "angle 0.0 deg below 10, overlap 1.00 above 0.7"
    assert again.report.passes == 0 and again.report.ids == () and last.report.reused == ""
    again.chunk.actions[:] = 0  # a copy: the memory of the last chunk is its own
    assert last.chunk.actions.any()


@pytest.mark.parametrize(
    "changed", ["another chunk", "no chunk", "instruction", "little left", "past its end", "reset", "committed"]
)
def test_whatever_breaks_the_thread_asks_the_model(changed) -> None:
    inner = Slots()
    policy = ReusePolicy(inner)
    last = twice(policy)
    context, asked = context_after(last), observation(9, "pull" if changed == "instruction" else "push")
    if changed == "another chunk":
        context = context_after(InferResult(ActionChunk(last.chunk.actions + 1, last.chunk.start_ns, 0.05)))
    elif changed == "no chunk":
        context = InferContext(start_ns=9 * PERIOD_NS)
    elif changed == "little left":
        context = context_after(last, 13)
    elif changed == "past its end":
        context = context_after(last, 20)
    elif changed == "committed":
        context = context_after(last, committed=last.chunk.actions[4:13])
    elif changed == "reset":
        policy.reset(1)
    assert infer(policy, asked, context).report.reused == ""
    assert len(inner.asked) == 3


def test_a_batch_asks_for_those_that_need_it_and_each_place_has_its_own_memory() -> None:
    inner = Slots()
    policy = ReusePolicy(inner)
    policy.reset(0)
    first = policy.infer_batch([observation(1), observation(2)], [InferContext(start_ns=PERIOD_NS)] * 2)
    second = policy.infer_batch([observation(3), observation(4)], [context_after(result) for result in first])
    third = policy.infer_batch(
        [observation(5, "turn"), observation(6)], [context_after(result, 6) for result in second]
    )
    assert inner.asked == [[1, 2], [3, 4], [5]]
    assert [bool(result.report.reused) for result in third] == [False, True]
    fourth = policy.infer_batch(
        [observation(7, "turn"), observation(8)], [context_after(third[0], 6), context_after(third[1], 2)]
    )
    assert [bool(result.report.reused) for result in fourth] == [False, False]  # one new to its task, one capped
    swapped = policy.infer_batch([observation(9), observation(10, "turn")], [context_after(r) for r in fourth[::-1]])
    assert not any(result.report.reused for result in swapped)  # the robots changed places: none gets another's chunk


def test_a_skipped_step_still_refuses_a_broken_state() -> None:
    policy = ReusePolicy(Slots())
    context = context_after(twice(policy))
    broken = Observation({}, np.array([0, np.nan, 0], np.float32), "push", 9)
    with pytest.raises(ObservationError, match="NaN"):
        infer(policy, broken, context)
    assert infer(policy, observation(), context).report.reused  # it was not counted as a reuse


def test_a_policy_without_visual_tokens_is_named_not_never_reused() -> None:
    with pytest.raises(ConfigError, match="drop=False"):
        infer(ReusePolicy(Slots(tokens=None)), observation())


def test_it_works_on_a_real_policy_that_only_scores() -> None:
    heads = (HeadConfig("words", "tokens", 0, 9),)
    inner = VlaPolicy(bundle_of(heads=heads, text_vocab=512), selection=TokenSelection(1, 0.5, drop=False))
    policy = ReusePolicy(inner, ReuseRule(angle_deg=180, least=1))
    images = {"front": np.zeros((32, 32, 3), np.uint8), "wrist": np.zeros((16, 16, 3), np.uint8)}
    seen = Observation(images, np.zeros(3, np.float32), "push", PERIOD_NS)
    results = [infer(policy, seen)]
    for _ in range(3):
        results.append(infer(policy, seen, context_after(results[-1], 1)))
    gripper = results[0].chunk.actions[:, 2] > 0
    expected = [False, False, bool((gripper == gripper[0]).all()), False]  # blank pictures: each forward is the same
    assert [bool(result.report.reused) for result in results] == expected
    assert len(results[0].report.kept_tokens) == 10


def test_it_is_built_from_plain_configs() -> None:
    rule = build({"_target_": "vla.decoding.reuse.ReuseRule", "most": 2})
    assert ReusePolicy(Slots(), rule).rule.most == 2
