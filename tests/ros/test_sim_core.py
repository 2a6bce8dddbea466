"""The simulator core: streams, episodes, time, and what it keeps to itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ros_nodes import messages as m
from ros_nodes.node import CLOCK, INSTRUCTION, JOINT_STATES, RESET, SIM_STATUS, Effects, Job, Now, Send
from ros_nodes.sim_node import SimCore
from sim.environment import LazyImages, make
from vla.errors import ConfigError
from vla.resources import load_embodiment
from vla.types import Command, Observation

MS = 1_000_000
T0 = 1_700_000_000_000_000_000


class Driver:
    def __init__(self, environment: Any, **options: Any) -> None:
        self.core = SimCore(environment, **options)
        self.robot = environment.embodiment
        self.time_ns = 5_000 * MS
        self.sent: list[Send] = []
        self.jobs: list[Job] = []

    def now(self) -> Now:
        return Now(T0 + self.time_ns, self.time_ns, self.time_ns)

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            (self.jobs if isinstance(effect, Job) else self.sent).append(effect)  # type: ignore[attr-defined]

    def give(self, topic: str, message: m.Message) -> None:
        self.perform(self.core.on_message(topic, message, self.now()))

    def work(self) -> None:
        """Run the oldest job, as the worker thread would."""
        job = self.jobs.pop(0)
        try:
            value = job.run()
        except Exception as error:
            value = error
        self.perform(self.core.on_result(job.name, value, self.now()))

    def run(self, milliseconds: int, work: bool = True) -> None:
        for _ in range(milliseconds):
            self.time_ns += MS
            if self.time_ns >= self.core.next_tick_ns:
                self.perform(self.core.tick(self.now()))
            while work and self.jobs:
                self.work()

    def on(self, topic: str) -> list[Any]:
        return [s.message for s in self.sent if s.topic == topic]

    def status(self) -> dict[str, Any]:
        return self.on(SIM_STATUS.topic)[-1].object()

    def reset(self, **values: Any) -> None:
        self.give(RESET.topic, m.Text.of(**values))

    def command(self, values: np.ndarray) -> None:
        self.give(self.robot.command_topic, m.Values(values))


@pytest.fixture(scope="module")
def environment() -> Any:
    environment = make("tabletop")
    yield environment
    environment.close()


def test_streams_begin_at_once_and_keep_their_rates(environment: Any) -> None:
    driver = Driver(environment)
    driver.run(1000)
    assert len(driver.on(JOINT_STATES.topic)) == pytest.approx(100, abs=1)
    for camera in driver.robot.cameras:
        stamps = [image.stamp_ns for image in driver.on(camera.topic)]
        assert len(stamps) == 20 and set(np.diff(stamps)) == {50 * MS}
    joints = driver.on(JOINT_STATES.topic)
    assert set(np.diff([j.stamp_ns for j in joints])) == {10 * MS}
    assert joints[0].names == driver.robot.command_names
    assert abs(joints[-1].stamp_ns - driver.now().stamp_ns) <= 10 * MS
    assert [c.stamp_ns for c in driver.on(CLOCK.topic)] == [j.stamp_ns for j in joints]
    image = driver.on(driver.robot.cameras[0].topic)[-1]
    assert image.pixels.shape == (128, 128, 3) and image.pixels.std() > 5


def test_an_episode_from_reset_to_its_end(environment: Any) -> None:
    driver = Driver(environment)
    driver.run(100)
    driver.reset(episode=3, seed=1_000_001, task="push")
    status = driver.status()
    assert (status["state"], status["episode"], status["seed"], status["done"]) == ("running", 3, 1_000_001, False)
    assert driver.on(INSTRUCTION.topic)[-1].data == status["instruction"] == environment.instruction
    stamps = {image.stamp_ns % (50 * MS) for image in driver.on(driver.robot.cameras[0].topic)}
    assert stamps == {status["start_ns"] % (50 * MS)}  # control periods begin with a picture
    driver.run(9000)
    status = driver.status()
    assert status["state"] == "done" and not status["success"] and status["steps"] == environment.max_steps
    assert status["moved"] is None and status["object"]


def test_commands_are_obeyed_only_while_an_episode_runs(environment: Any) -> None:
    driver = Driver(environment)
    target = np.array(driver.robot.home)
    target[0] += 0.3
    driver.run(200)
    driver.command(target)
    driver.run(300)
    assert abs(driver.on(JOINT_STATES.topic)[-1].positions[0]) < 0.15  # idle
    driver.reset(episode=0, seed=1)
    start = environment.joint_state()[1][0]
    driver.command(target)  # meant for the episode before
    driver.run(90)
    assert abs(driver.on(JOINT_STATES.topic)[-1].positions[0] - start) < 0.02
    driver.run(60)
    driver.command(target)
    driver.run(600)
    assert driver.on(JOINT_STATES.topic)[-1].positions[0] == pytest.approx(0.3, abs=0.03)
    for bad in (np.full(8, np.nan), np.zeros(7), np.zeros(0)):
        driver.command(bad)
    driver.run(100)
    assert driver.core.summary()["refused"] == 3
    assert driver.on(JOINT_STATES.topic)[-1].positions[0] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"episode": 1, "seed": 1, "task": "pusch"}, "Did you mean 'push'"),
        ({"episode": 1, "seed": 1, "sed": 2}, "unknown key 'sed'. Did you mean 'seed'"),
        ({"episode": 1}, "seed"),
        ({"episode": 1, "seed": "7"}, "whole number"),
        ({"episode": 1, "seed": 7, "instruction": "x" * 10_000}, "10000 characters"),
    ],
)
def test_a_reset_that_cannot_be_done_is_answered_with_the_reason(environment: Any, values: Any, words: str) -> None:
    driver = Driver(environment)
    driver.reset(**values)
    assert driver.status()["state"] == "error" and words in driver.status()["error"]
    driver.reset(episode=2, seed=1)
    assert driver.status()["state"] == "running"


def test_a_reset_that_is_no_json(environment: Any) -> None:
    driver = Driver(environment)
    driver.give(RESET.topic, m.Text("go!"))
    assert driver.status()["state"] == "error" and "JSON object" in driver.status()["error"]


def test_time_lost_by_the_machine_is_lost_to_the_physics_not_to_the_stamps(environment: Any) -> None:
    driver = Driver(environment)
    driver.run(100)
    driver.time_ns += 1000 * MS  # nobody ran for a second
    driver.run(100)
    assert abs(driver.on(JOINT_STATES.topic)[-1].stamp_ns - driver.now().stamp_ns) <= 10 * MS
    assert driver.core.summary()["slices_late"] >= 90


def test_nothing_of_the_simulators_state_is_published(environment: Any) -> None:
    driver = Driver(environment)
    driver.run(50)
    driver.reset(episode=0, seed=1_000_000)
    driver.run(300)
    kinds = {type(s.message) for s in driver.sent}
    assert kinds == {m.Image, m.JointState, m.Clock, m.Text}
    assert {n for j in driver.on(JOINT_STATES.topic) for n in j.names} == set(driver.robot.command_names)
    allowed = {
        "success", "done", "steps", "state", "episode", "seed", "instruction", "start_ns", "rtf", "stamp_ns",
    }  # fmt: skip
    for text in driver.on(SIM_STATUS.topic):
        assert set(json.loads(text.data)) <= allowed


class Slow:
    """An operational-space arm without slices, such as LIBERO's: counts what it is given."""

    def __init__(self) -> None:
        self.embodiment = load_embodiment("libero")
        self.max_steps, self.instruction = 10, "do it"
        self.commands: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.commands.clear()
        return self._observe(), {"success": False}

    def _observe(self) -> Observation:
        images = LazyImages(self.embodiment.camera_names, lambda _: np.zeros((128, 128, 3), np.uint8))
        return Observation(images, np.zeros(8, np.float32), "do it", 0)

    def step(self, command: Command) -> Any:
        self.commands.append(command.values)
        return self._observe(), 0.0, False, False, {"success": False}

    def joint_state(self) -> Any:
        names = tuple(joint.name for joint in self.embodiment.joints)
        return names, np.zeros(len(names)), np.zeros(len(names))

    def close(self) -> None:
        pass


def test_a_slow_environment_steps_on_simulated_time_and_takes_each_delta_once() -> None:
    environment = Slow()
    driver = Driver(environment, real_time_factor=0.25)
    assert driver.core.simulated_time
    driver.reset(episode=0, seed=0)
    driver.work()
    driver.run(230)
    driver.command(np.full(7, 0.5))
    driver.run(800)
    assert len(environment.commands) == pytest.approx(5, abs=1)  # 50 ms of simulated time every 200 ms
    assert sum(float(np.any(c)) for c in environment.commands) == 1
    clock = [c.stamp_ns for c in driver.on(CLOCK.topic)]
    assert set(np.diff(clock)) == {50 * MS} and clock[0] < 2 * 10**9
    assert driver.status()["rtf"] == pytest.approx(0.25, rel=0.3)
    assert len(driver.on("/state")[0].positions) == 8


def test_a_reset_during_a_slow_step_waits_for_it() -> None:
    driver = Driver(Slow(), real_time_factor=0.25)
    driver.reset(episode=0, seed=0)
    driver.work()
    driver.run(250, work=False)
    assert [job.name for job in driver.jobs] == ["step"]
    driver.reset(episode=1, seed=1)
    assert driver.status()["episode"] == 0
    driver.work()
    assert [job.name for job in driver.jobs] == ["reset"]
    driver.work()
    assert driver.status()["episode"] == 1 and driver.status()["state"] == "running"


def test_a_real_time_factor_is_checked() -> None:
    with pytest.raises(ConfigError, match="rtf"):
        SimCore(Slow(), real_time_factor=0)
