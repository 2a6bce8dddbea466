"""A robot's driver, as far as faults need one: what it does with the last command when no other comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from ros_nodes.messages import JointState, Message, Trajectory, Values, decode, encode
from ros_nodes.node import JOINT_STATES, Endpoint
from ros_nodes.shell import GraphClock
from ros_nodes.wire import Participant
from vla.types import NS_PER_S

State = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, velocities, accelerations, float64[D] each


class TrajectoryDriver:
    """Executes the newest trajectory as ros2_control's joint_trajectory_controller does: from the state it is in,
    quintic splines through the points, and rest after the last."""

    def __init__(self, positions: np.ndarray) -> None:
        none = np.zeros(len(positions))
        self._knots: list[tuple[int, State]] = [(0, (np.array(positions), none, none))]

    def take(self, message: Message, now_ns: int) -> None:
        assert isinstance(message, Trajectory) and not np.any(message.velocities[-1])
        rows = zip(message.times_ns, message.positions, message.velocities, message.accelerations)
        points = [(message.stamp_ns + at, (q, v, a)) for at, q, v, a in rows]
        self._knots = [(now_ns, self.at(now_ns)), *(point for point in points if point[0] > now_ns)]

    def at(self, now_ns: int) -> State:
        after = next((i for i, (at, _) in enumerate(self._knots) if at > now_ns), len(self._knots))
        if after == len(self._knots):
            rest = self._knots[-1][1][0]
            return rest, np.zeros(len(rest)), np.zeros(len(rest))
        begin_ns, (p, v, a) = self._knots[after - 1]
        end_ns, (p1, v1, a1) = self._knots[after]
        t, x = (end_ns - begin_ns) / NS_PER_S, (now_ns - begin_ns) / NS_PER_S
        c3 = (20 * (p1 - p) - (8 * v1 + 12 * v) * t - (3 * a - a1) * t**2) / (2 * t**3)
        c4 = (30 * (p - p1) + (14 * v1 + 16 * v) * t + (3 * a - 2 * a1) * t**2) / (2 * t**4)
        c5 = (12 * (p1 - p) - 6 * (v1 + v) * t - (a - a1) * t**2) / (2 * t**5)
        return (
            p + v * x + a / 2 * x**2 + c3 * x**3 + c4 * x**4 + c5 * x**5,
            v + a * x + 3 * c3 * x**2 + 4 * c4 * x**3 + 5 * c5 * x**4,
            a + 6 * c3 * x + 12 * c4 * x**2 + 20 * c5 * x**3,
        )


class VelocityDriver:
    """Goes on with the last velocities for `timeout_s`, then stops: what kind: velocities asks of a driver."""

    def __init__(self, positions: np.ndarray, timeout_s: float) -> None:
        self._positions, self._velocities = np.array(positions), np.zeros(len(positions))
        self._timeout_ns = round(timeout_s * NS_PER_S)
        self._since_ns = 0

    def take(self, message: Message, now_ns: int) -> None:
        assert isinstance(message, Values)
        self._positions = self.at(now_ns)[0]
        self._velocities, self._since_ns = message.data, now_ns

    def at(self, now_ns: int) -> State:
        moving_s = min(now_ns - self._since_ns, self._timeout_ns) / NS_PER_S
        stopped = now_ns - self._since_ns >= self._timeout_ns
        return self._positions + moving_s * self._velocities, self._velocities * (not stopped), self._velocities * 0.0


class Bridge:
    """Between a command node and the simulated arm, in a thread: a driver, sampled to positions at 100 Hz.

    make: of the driver, at the measured positions; None: the arm takes what the command node sends.
    measured: (steady time, positions) of the arm's joint states.
    """

    def __init__(self, domain: int, arm_topic: str, commands: Endpoint, make: Callable[[np.ndarray], object] | None):
        self._participant, self._clock = Participant("driver", domain=domain), GraphClock()
        self._commands, self._make = commands, make
        self._driver: TrajectoryDriver | VelocityDriver | None = None
        self.measured: list[tuple[int, np.ndarray]] = []
        self._participant.subscribe(JOINT_STATES.topic, JOINT_STATES.type_name, JOINT_STATES.quality, self._on_joints)
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if make is not None:
            self._publisher = self._participant.publisher(arm_topic, Values.type_name)
            self._participant.subscribe(commands.topic, commands.type_name, commands.quality, self._on_command)
            self._thread.start()
        self._participant.start()

    def _on_joints(self, data: bytes, received_ns: int) -> None:
        message = decode(JointState.type_name, data)
        assert isinstance(message, JointState)
        self.measured.append((received_ns, message.positions))

    def _on_command(self, data: bytes, received_ns: int) -> None:
        with self._lock:
            if self._driver is None:
                assert self._make is not None
                self._driver = self._make(self.measured[-1][1])  # type: ignore[assignment]
            self._driver.take(decode(self._commands.type_name, data), self._clock.now().stamp_ns)

    def _run(self) -> None:
        while not self._closing.wait(0.01):
            with self._lock:
                values = None if self._driver is None else self._driver.at(self._clock.now().stamp_ns)[0]
            if values is not None:
                self._publisher.publish(encode(Values(values)))

    def speed(self) -> float:
        """Of the fastest joint in the newest joint states, rad/s."""
        last = self.measured[-6:]
        return float(np.max(np.abs(last[-1][1] - last[0][1]))) / 0.05 if len(last) == 6 else 0.0

    def rested_ns(self, since_ns: int) -> int:
        """Steady time at which the arm stood still for good; it must have."""
        last = [item for item in self.measured if item[0] > since_ns]
        moving = np.flatnonzero([np.max(np.abs(q - last[-1][1])) > 2e-3 for _, q in last])
        assert not len(moving) or moving[-1] < len(last) - 20, "the arm still moves"
        return last[moving[-1] + 1][0] if len(moving) else since_ns

    def close(self) -> None:
        self._closing.set()
        if self._make is not None:
            self._thread.join(5)
        self._participant.close()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
