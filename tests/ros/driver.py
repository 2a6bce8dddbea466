"""The command core behind plain calls: shell, arm, simulator and policy in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes import messages as m
from ros_nodes.command_node import CommandCore, build_core
from ros_nodes.joints import JointTopic, joint_topics
from ros_nodes.node import (
    CHUNK,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    PICTURE_KEY,
    REQUEST,
    SIM_STATUS,
    SPACING_KEY,
    STAMP_KEY,
    Effects,
    Goal,
    Job,
    Now,
    Send,
)
from ros_nodes.request import ChunkId, Request
from vla.embodiment import Embodiment
from vla.resources import load_embodiment
from vla.types import ActionChunk

ROBOT = load_embodiment("tabletop")
T0 = 1_000_000_000_000
MS = 1_000_000
PERIOD = 50 * MS


class Driver:
    """Shell, arm, simulator and policy in one: the arm follows commands, the policy moves sideways at 0.1 m/s."""

    def __init__(self, out: Path | None = None, robot: Embodiment = ROBOT, **options: Any) -> None:
        self.robot = robot
        self.core: CommandCore = build_core(robot, out, capacity=2000, **options)
        self.time_ns = 10_000 * MS
        self.jump_ns = 0  # of the graph's clock against the steady one
        self.positions = np.array(robot.home)
        self.sent: list[tuple[int, Send]] = []
        self.goals: list[Goal] = []
        self.beat: dict[str, str] | None = {}  # more of what the heartbeat says; None: cameras at the control rate
        self.camera_ns = PERIOD
        self.policy_alive = self.joints_alive = True
        self.answer_after_ns = 20 * MS
        self.number = 0
        self.pending: list[tuple[int, Request]] = []
        self.lose = self.lose_chunks = 0  # so many of the next requests, or answers, are lost
        self.topics = joint_topics(robot)
        self.names = tuple(name for topic in self.topics for name in topic.names)  # as the drivers say them
        self.silent: set[str] = set()  # topics of joint states
        self.offset = np.zeros(len(self.names))  # of the measured positions
        self.follows = True  # False: the arm stands, whatever it is told

    def now(self) -> Now:
        return Now(T0 + self.time_ns + self.jump_ns, self.time_ns, self.time_ns)

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Job):
                self.perform(self.core.on_result(effect.name, effect.run(), self.now()))
                continue
            if isinstance(effect, Goal):
                self.goals.append(effect)
                continue
            self.sent.append((self.time_ns, effect))
            if effect.topic == REQUEST.topic and self.lose:
                self.lose -= 1
            elif effect.topic == REQUEST.topic and self.policy_alive:
                self.pending.append((self.time_ns + self.answer_after_ns, Request.read(effect.message)))
            elif effect.topic == self.robot.command_topic:
                self.positions = self.moved(effect.message.data)
            elif isinstance(effect.message, m.Trajectory):
                joints = next(sink.joints for sink in self.robot.sinks if sink.topic == effect.topic)
                for name, value in zip(joints, effect.message.positions[0]):
                    self.positions[self.robot.command_names.index(name)] = value

    def moved(self, values: np.ndarray) -> np.ndarray:
        """Where a command brings the arm."""
        if not self.follows:
            return self.positions
        velocities = self.robot.outputs and self.robot.outputs[0].kind == "velocities"
        return self.positions + values * self.robot.period_s if velocities else values.copy()

    def give(self, topic: str, message: m.Message) -> None:
        self.perform(self.core.on_message(topic, message, self.now()))

    def begin(self, episode: int = 0, start_ns: int | None = None) -> None:
        start = T0 + self.time_ns + 100 * MS if start_ns is None else start_ns
        values = {"state": "running", "episode": episode, "seed": 7, "instruction": "go", "start_ns": start}
        self.give(SIM_STATUS.topic, m.Text.of(**values))

    def chunk(self, request: Request, actions: Any = None, number: int | None = None) -> None:
        rows = np.zeros((16, self.robot.action_dim), np.float32)
        rows[:, 1], rows[:, -1] = 0.005, 1.0
        if self.robot.action_space == "joint_position":
            rows[:] = self.positions
            rows[:, 0] += 0.01 * np.arange(1, 17)
        chunk = ActionChunk(rows if actions is None else actions, request.start_ns + PERIOD // 2, 0.05)
        identity = ChunkId(request.episode, request.number, self.number if number is None else number, 20_000)
        self.number += 1
        if self.lose_chunks:
            self.lose_chunks -= 1
            return
        self.give(CHUNK.topic, m.chunk_to_trajectory(chunk, self.robot.action_names, identity.text()))

    def run(self, milliseconds: int) -> None:
        for _ in range(milliseconds):
            self.time_ns += MS
            if self.joints_alive and self.time_ns % (10 * MS) == 0:
                for topic in self.topics:
                    if topic.topic not in self.silent:
                        self.give(topic.topic, self.joints(topic))
            if self.policy_alive and self.time_ns % PERIOD == 7 * MS:
                queue = {"queue": str(int(bool(self.pending)))}
                self.give(HEARTBEAT.topic, m.Status(m.OK, "policy", "ready", queue | self.pictures()))
            while self.policy_alive and self.pending and self.pending[0][0] <= self.time_ns:
                self.chunk(self.pending.pop(0)[1])
            if self.time_ns >= self.core.next_tick_ns:
                self.perform(self.core.tick(self.now()))

    def joints(self, topic: JointTopic) -> m.JointState:
        names, positions = tuple(self.names[i] for i in topic.places), (self.positions + self.offset)[topic.places]
        return m.JointState(T0 + self.time_ns + self.jump_ns, names, positions, np.zeros(len(names)))

    def pictures(self) -> dict[str, str]:
        """What the policy says of its cameras, which take a picture every camera_ns."""
        if self.beat is not None:
            return self.beat
        stamp = str(T0 + self.jump_ns + self.time_ns // self.camera_ns * self.camera_ns)
        told = {STAMP_KEY: stamp, PICTURE_KEY: stamp, SPACING_KEY: str(self.camera_ns)}
        return {key + name: value for name in self.robot.camera_names for key, value in told.items()}

    def commands(self, since_ns: int = 0) -> list[tuple[int, np.ndarray]]:
        return [(t, s.message.data) for t, s in self.sent if s.topic == ROBOT.command_topic and t > since_ns]

    def status(self) -> dict[str, Any]:
        return [s.message for _, s in self.sent if s.topic == CONTROL_STATUS.topic][-1].object()

    def status_now(self) -> dict[str, Any]:
        return self.core._status(self.now()).message.object()  # type: ignore[union-attr]

    def diagnosis(self) -> m.Status:
        return [s.message for _, s in self.sent if s.topic == DIAGNOSTICS.topic][-1].statuses[0]

    def moving(self) -> Driver:
        self.run(50)
        self.begin()
        self.run(1000)
        assert self.status()["verdict"] in ("pass", "reshape")
        return self
