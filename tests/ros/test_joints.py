"""A robot whose joint states come on several topics: merged by name, watched, recorded and replayed one by one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shells import SHELLS, drivers, graph

from policies.hold import HoldPolicy
from ros_nodes import messages as m
from ros_nodes.bag import Bag
from ros_nodes.convert import convert
from ros_nodes.doctor import OK, WRONG, Live, check
from ros_nodes.joints import joint_topics, merged
from ros_nodes.node import CONTROL, DIAGNOSTICS, INSTRUCTION, REQUEST, Endpoint, Job, Now
from ros_nodes.policy_node import PolicyCore
from ros_nodes.reenact import reels_of_bag
from ros_nodes.replay import replay_requests
from ros_nodes.request import ChunkId, Request
from tests.ros import recordings as take
from tests.ros.driver import MS, T0, Driver
from vla.data.lerobot import LeRobotDataset
from vla.embodiment import Camera, JointSource
from vla.errors import TransportError
from vla.policy import InferResult
from vla.resources import load_embodiment
from vla.runtime.gate import Reason
from vla.types import ActionChunk

ALOHA = load_embodiment("aloha")
LEFT, RIGHT = (source.topic for source in ALOHA.joint_states)
ROBOT = replace(ALOHA, rate_hz=20.0)  # the driver's rate


# ---- by name ----
def test_plain_names_of_two_arms_land_on_their_own_joints_in_any_order() -> None:
    topics, rows = joint_topics(ALOHA), []
    values = np.arange(14.0)
    for topic, shift in zip(topics, (0, 7)):
        names = ("right_finger", *reversed(topic.names))  # the broadcaster has more, and an order of its own
        message = m.JointState(1, names, np.array([99.0, *range(shift + 6, shift - 1, -1)]), np.arange(8.0))
        rows.append((topic, topic.positions(message)))
        np.testing.assert_array_equal(topic.velocities(message), [7, 6, 5, 4, 3, 2, 1])
    np.testing.assert_array_equal(merged(rows), values)
    np.testing.assert_array_equal(merged((t, np.stack([row, row])) for t, row in rows), [values, values])


def test_what_cannot_be_used_names_its_topic() -> None:
    topic = joint_topics(ALOHA)[1]
    plain = m.JointState(1, topic.names, np.zeros(7))
    assert np.array_equal(topic.positions(plain), np.zeros(7)) and topic.velocities(plain) is None
    for message, words in (
        (replace(plain, names=("hip", *topic.names[1:])), "missing ['waist']"),
        (replace(plain, positions=np.empty(0)), "0 positions"),
        (replace(plain, positions=np.array([0, 0, np.nan, 0, 0, 0, 0.0])), "NaN or infinity in ['elbow']"),
    ):
        with pytest.raises(TransportError, match=rf"{RIGHT}: expected .*{re.escape(words)}"):
            topic.positions(message)


def test_one_topic_is_called_as_ever() -> None:
    (topic,) = joint_topics(load_embodiment("panda"))
    assert (topic.topic, topic.label) == ("/joint_states", "joint states")
    (vector,) = joint_topics(load_embodiment("libero"), vector=True)
    assert (vector.topic, vector.names) == ("/state", load_embodiment("libero").state_names)


# ---- the command core ----
def moving() -> Driver:
    return Driver(robot=ROBOT).moving()


def test_both_arms_move_on_two_topics() -> None:
    driver = moving()
    assert {LEFT, RIGHT} <= {endpoint.topic for endpoint in driver.core.subscriptions}
    assert driver.positions[0] > ROBOT.home[0] + 0.05 and driver.diagnosis().level == m.OK
    _, positions, velocities = driver.core._watch.joints
    np.testing.assert_allclose(positions, driver.positions, atol=0.03)  # one period behind
    assert velocities is not None and velocities.shape == (14,)


@pytest.mark.parametrize("topic", [LEFT, RIGHT])
def test_an_arm_that_falls_silent_stops_both_and_is_named(topic: str) -> None:
    driver = moving()
    last = driver.time_ns // (10 * MS) * 10 * MS
    driver.silent.add(topic)
    driver.run(400)
    stop = driver.core.summary()["stops"][-1]
    assert stop["reason"] == Reason.JOINT_STATE_STALE.text and stop["stamp_ns"] - T0 - last <= 150 * MS
    said = driver.diagnosis().values["joint_states"]
    assert topic in said and ({LEFT, RIGHT} - {topic}).pop() not in said
    driver.silent.clear()
    driver.run(1500)
    assert driver.status_now()["verdict"] in ("pass", "reshape") and "joint_states" not in driver.diagnosis().values


def test_an_arm_that_was_never_heard_is_named_and_nothing_moves() -> None:
    driver = Driver(robot=ROBOT)
    driver.silent.add(RIGHT)
    driver.run(50)
    driver.begin()
    driver.run(500)
    assert (
        driver.status()["phase"] == "armed"
        and driver.diagnosis().values["joint_states"] == f"no joint states {RIGHT} yet"
    )


@pytest.mark.parametrize("fault", ["NaN", "a lost joint", "a jump", "another clock"])
def test_a_fault_of_one_arm_stops_both_and_is_named(fault: str) -> None:
    driver = moving()
    driver.run(2)
    topic = driver.topics[1]
    message, reason = driver.joints(topic), Reason.JOINT_STATE_INVALID
    if fault == "NaN":
        message.positions[2] = np.nan
    elif fault == "a lost joint":
        message = replace(message, names=("hip", *message.names[1:]))
    elif fault == "a jump":
        message.positions[2] += 0.5
        reason = Reason.JOINT_STATE_JUMP
    else:
        message = replace(message, stamp_ns=message.stamp_ns + 10**9)  # newer than the other arm's, and no fresher
        reason = Reason.JOINT_STATE_STALE
    at = driver.time_ns
    driver.give(RIGHT, message)
    stop = driver.core.summary()["stops"][-1]
    assert (stop["reason"], stop["stamp_ns"]) == (reason.text, T0 + at)
    said = driver.diagnosis().values["joint_states"]
    assert RIGHT in said and LEFT not in said and ("elbow" in said or fault in ("a lost joint", "another clock"))
    driver.run(1500)
    assert driver.status_now()["verdict"] in ("pass", "reshape")


# ---- the policy core ----
class Copying(HoldPolicy):
    """Chunks that are the state it was given: whoever is given another one answers otherwise."""

    def infer_batch(self, observations: Any, contexts: Any) -> list[InferResult]:
        return [
            InferResult(ActionChunk(np.tile(seen.state, (4, 1)), seen.stamp_ns, self.embodiment.period_s))
            for seen in observations
        ]


TWO = replace(
    take.ROBOT,
    joint_states=(
        JointSource("/arm/joint_states", ("shoulder", "elbow"), ("j1", "j2")),
        JointSource("/hand/joint_states", ("gripper",), ("finger",)),
    ),
)
ARM, HAND = (source.topic for source in TWO.joint_states)


def policy_core() -> PolicyCore:
    return PolicyCore(Copying(TWO, 4), TWO.joint_state_vector, slop_s=0.01)


def tell(core: Any, topic: str, message: m.Message, at_ns: int) -> list[Any]:
    effects = list(core.on_message(topic, message, Now(at_ns, at_ns, at_ns)))
    for effect in list(effects):
        if isinstance(effect, Job):
            effects += core.on_result(effect.name, effect.run(), Now(at_ns, at_ns, at_ns))
    return [effect for effect in effects if not isinstance(effect, Job)]


def look(core: Any, at_ns: int) -> None:
    for camera in TWO.cameras:
        tell(core, camera.topic, m.Image(at_ns, "", "rgb8", take.picture(0, camera)), at_ns)


def test_an_observation_has_of_each_topic_the_state_nearest_to_its_picture() -> None:
    core, at = policy_core(), take.T0
    tell(core, INSTRUCTION.topic, m.Text("go"), at)
    for offset in (-9, -3, 4, 8):
        tell(core, ARM, m.JointState(at + offset * MS, ("j2", "j1"), np.array([offset, 10.0 + offset])), at)
    tell(core, HAND, m.JointState(at + 7 * MS, ("finger",), np.array([0.5])), at)
    look(core, at)
    (chunk,) = (effect.message for effect in tell(core, REQUEST.topic, Request(0, 0, 0, at).text(), at))
    np.testing.assert_array_equal(chunk.positions[0].astype(np.float32), np.float32([7, -3, 0.5]))
    assert ChunkId.read(chunk.frame_id).offsets_ns == (-3 * MS, 7 * MS, 0)


def test_without_one_arm_there_is_no_observation_and_the_heartbeat_says_which() -> None:
    core, at = policy_core(), take.T0
    tell(core, INSTRUCTION.topic, m.Text("go"), at)
    tell(core, ARM, m.JointState(at, ("j1", "j2"), np.zeros(2)), at)
    look(core, at)
    assert not tell(core, REQUEST.topic, Request(0, 0, 0, at).text(), at)
    core.tick(Now(at + 10**9, at + 10**9))
    assert f"['joint states {HAND}']" in core.status(Now(at, at)).message
    tell(core, HAND, m.JointState(at, ("thumb",), np.zeros(1)), at)
    assert f"joint states {HAND}: expected positions of ['finger']" in core.status(Now(at, at)).message


# ---- recordings ----
def recorded(out: Path, without: tuple[str, ...] = (), gap_ms: range = range(0)) -> Path:
    """A second of it: the arm's states every 10 ms, the hand's every 20 ms, and a policy that is asked twice."""
    recorder, core = take.Take(out, TWO, without=without), policy_core()

    def say(topic: str, message: m.Message, at: int) -> None:
        recorder.give(topic, message, at)
        if any(endpoint.topic == topic for endpoint in core.subscriptions):
            for effect in tell(core, topic, message, at):
                recorder.give(effect.topic, effect.message, at + MS)

    say(INSTRUCTION.topic, m.Text("push the cube"), take.T0 - 5 * MS)
    recorder.mark("start", take.T0 - 2 * MS)
    for step in range(-5, 1000):
        at = take.T0 + step * MS
        where = take.position(at)
        if step % 10 == 4:
            say(ARM, m.JointState(at, ("j2", "j1"), where[[1, 0]]), at)
        if step % 20 == 3 and step not in gap_ms:
            say(HAND, m.JointState(at, ("finger",), where[[2]]), at)
        if step % 50 == 2 and step > 0:
            for camera in TWO.cameras:
                say(camera.topic, m.Image(at - 2 * MS, "", "rgb8", take.picture(step // 50, camera)), at)
            recorder.give(TWO.command_topic, m.Values(take.command(step // 50)), at)
        if step in (310, 620):
            say(REQUEST.topic, Request(0, 5, step, at - 60 * MS).text(), at)
    recorder.mark("stop", take.T0 + 1000 * MS)
    return recorder.finish()[-1]


def test_each_topic_is_interpolated_on_its_own(tmp_path: Path) -> None:
    report = convert([recorded(tmp_path / "bags")], TWO, tmp_path / "data")
    assert not report.skipped, report.skipped
    state = LeRobotDataset(tmp_path / "data").column("observation.state")
    times = take.T0 + np.arange(1, 20) * take.PERIOD  # of pictures from the first command on
    expected = np.stack([take.position(int(at)) for at in times])
    np.testing.assert_allclose(state, expected, atol=1e-6)


def test_a_topic_that_is_missing_or_has_a_hole_is_named(tmp_path: Path) -> None:
    hole = recorded(tmp_path / "hole", gap_ms=range(300, 500))
    none = recorded(tmp_path / "none", without=(HAND,))
    report = convert([recorded(tmp_path / "good"), hole, none], TWO, tmp_path / "data")
    assert report.episodes == 1
    assert [left.reason.startswith(words) for left, words in zip(
        report.skipped, (f"joint states {HAND}: nothing for", f"{HAND}: no "), strict=True
    )] == [True, True], report.skipped  # fmt: skip


def test_a_recording_replays_bit_for_bit(tmp_path: Path) -> None:
    with Bag(recorded(tmp_path / "bags")) as bag:
        outcome = replay_requests(bag, policy_core(), TWO)
        assert outcome.same and outcome.compared == 8, outcome.to_dict()
        (reel,), _ = reels_of_bag(bag, TWO)
    # The loop's own schedule sees what the policy saw, of each topic one state and none in between.
    stamp, chunk = reel.asked[-1][0], reel.chunks[-1]
    np.testing.assert_array_equal(reel.state[np.searchsorted(reel.times, stamp)], chunk[0])
    assert chunk[0, 0] == np.float32(take.position(stamp + 4 * MS)[0])


# ---- the doctor ----
def examined(silent: str = "", names: tuple[str, ...] = ()) -> dict[str, Any]:
    small = tuple(Camera(camera.name, 24, 32, camera.topic) for camera in ALOHA.cameras)
    live = Live(replace(ALOHA, cameras=small))
    home = np.array(ALOHA.home)
    for at in range(0, 1000, 5):
        now = Now(T0 + at * MS, at * MS, at * MS)
        for topic in joint_topics(ALOHA):
            if topic.topic != silent:
                said = names if names and topic.topic == RIGHT else topic.names
                live.on_message(topic.topic, m.JointState(T0 + at * MS, said, home[topic.places]), now)
    return {finding.name: finding for finding in check(live, {})}


def test_the_doctor_looks_at_each_topic() -> None:
    found = examined()
    for topic in (LEFT, RIGHT):
        for part in ("states {} rate", "states {} stamps", "names {}", "positions {}"):
            assert found[f"joint {part.format(topic)}"].state == OK
    found = examined(silent=RIGHT)
    assert found[f"joint states {RIGHT}"].got == "no publisher" and found[f"joint states {LEFT} rate"].state == OK
    found = examined(names=ALOHA.state_names[7:])
    wrong = found[f"joint names {RIGHT}"]
    assert wrong.state == WRONG and "waist" in wrong.got and found[f"joint names {LEFT}"].state == OK


# ---- over the wire ----
@pytest.mark.parametrize("shell", SHELLS)
def test_two_drivers_over_the_wire(shell: str) -> None:
    with graph(shell) as found:
        commands = Endpoint("/follower_right/arm_controller/joint_trajectory", m.Trajectory.type_name)
        for endpoint in (DIAGNOSTICS, commands):
            found.listen(endpoint)

        def told(words: str) -> None:
            found.heard[DIAGNOSTICS.topic].clear()
            found.hear(DIAGNOSTICS.topic, lambda m: words in m.statuses[0].values.get("joint_states", ""))

        with drivers(found, ALOHA) as silent:
            silent.add(RIGHT)
            found.operator.start()
            process = found.start("command", embodiment="aloha")
            told(f"no joint states {RIGHT} yet")
            silent.clear()
            found.say(CONTROL, m.Text.of(op="go", episode=1, seed=1))
            held = found.hear(commands.topic)
            assert held.names == joint_topics(ALOHA)[1].names[:6]
            np.testing.assert_allclose(held.positions[-1], ALOHA.home[7:13])
            silent.add(RIGHT)
            told(f"joint states {RIGHT}: the newest is")
        code, errors = found.end(process)
        assert code == 0, errors
