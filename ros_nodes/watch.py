"""What speaks against moving, of all that the control loop cannot see for itself: the command node's watch.

It is told what arrives and answers with one reason, the weightiest. Times are the steady clock's, stamps the graph's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from ros_nodes.joints import JointTopic, joint_topics, merged
from ros_nodes.messages import JointState, Status
from ros_nodes.node import (
    EMERGENCY_STOP,
    HEARTBEAT_PERIOD_NS,
    PICTURE_KEY,
    SILENCE_NS,
    SPACING_KEY,
    STAMP_KEY,
    Endpoint,
    Now,
)
from vla.embodiment import Embodiment
from vla.errors import TransportError, explain
from vla.runtime.gate import Reason
from vla.runtime.scheduler import MAX_GAP
from vla.types import NS_PER_S

STRANGER_NS = 1_000_000_000  # how long the arm waits after the last chunk of a second policy
DRIVER_NS = 1_000_000_000  # how long the arm waits after a driver takes goals again: these may still be aborted
REPLACED_NS = 3_000_000_000  # after the last chunk of the first policy, the second one is the only one
JUMP_TOLERANCE = 0.05  # rad or m: noise, and joint states that were late
JUMP_FACTOR = 2.0  # times the velocity limit: faster than that, a joint state is not motion
UNIT_REACH = 1.0  # rad or m beyond the limits, or the range once more: further out it is no such joint in no such unit
LATE_PERIODS = 2  # a camera that is slow by itself, or on a busy machine, may be late by so many of its own periods
_MOST_LATE_NS = 400_000_000
_STAMP = re.compile(r"-?[0-9]{1,19}")
FROZEN_TRAVEL = 0.05  # rad or m: after that much motion of one joint, a camera's picture must have changed


@dataclass(frozen=True)
class _Camera:
    """What the policy last said of a camera: stamp and fingerprint of its newest picture, and the usual distance of its
    stamps, 0 while not known. first_ns, joints: stamp and measured joints float64[D] when that fingerprint was new."""

    stamp_ns: int
    picture: str
    first_ns: int
    joints: np.ndarray | None
    period_ns: int = 0


class _Source:
    """One topic of joint states. newest: stamp, positions and velocities float64[J], None while there is none that can
    be used; fault: why. seen: the last good one, to tell jumps."""

    def __init__(self, reader: JointTopic, robot: Embodiment):
        self.reader = reader
        joints = [robot.joints[place] for place in reader.places]
        lower, upper = (np.array([getattr(j, side) for j in joints]) for side in ("lower", "upper"))
        reach = np.maximum(upper - lower, UNIT_REACH)
        self._range = (lower - reach, upper + reach)
        self._fastest = JUMP_FACTOR * np.array([joint.max_velocity for joint in joints])
        self.newest: tuple[int, np.ndarray, np.ndarray | None] | None = None
        self.seen: tuple[int, np.ndarray] | None = None
        self.fault = f"no {reader.label} yet"

    def take(self, message: JointState) -> Reason:
        """Into `newest`; what speaks against it."""
        label = self.reader.label
        try:
            positions = self.reader.positions(message)
            if np.any(positions < self._range[0]) or np.any(positions > self._range[1]):
                raise TransportError(explain(label, "rad and m in reach of the limits", positions, "Check the units."))
        except TransportError as error:
            self.newest, self.fault = None, str(error)
            return Reason.JOINT_STATE_INVALID
        jumped = self._jumped(message.stamp_ns, positions)
        self.newest = message.stamp_ns, positions, self.reader.velocities(message)
        self.fault = f"{label}: {jumped} jumped further than it can move" if jumped else ""
        return Reason.JOINT_STATE_JUMP if jumped else Reason.NONE

    def _jumped(self, stamp_ns: int, positions: np.ndarray) -> str:
        """The joint that is further from where it was last than it can have moved. Stamps that stand or run backwards
        have a reason of their own."""
        last, self.seen = self.seen, (stamp_ns, positions)
        if last is None or stamp_ns < last[0]:
            return ""
        beyond = np.abs(positions - last[1]) - self._fastest * ((stamp_ns - last[0]) / NS_PER_S) - JUMP_TOLERANCE
        return self.reader.names[int(np.argmax(beyond))] if np.any(beyond > 0) else ""

    def late(self, now: Now) -> str:
        """How far its stamp is from now, where that is too far."""
        age_ns = 0 if self.newest is None else now.stamp_ns - self.newest[0]
        return f"{self.reader.label}: the newest is {age_ns / 1e6:.0f} ms old" if abs(age_ns) >= SILENCE_NS else ""


class Watch:
    """robot: whose joints and cameras. deadman: one is asked for. estop_required, camera_timeout_s: see CommandCore.

    subscriptions: the topics of joint states. ending: the shell is about to fall silent. acted: what held the arm when
    it was last acted upon.
    """

    def __init__(
        self, robot: Embodiment, deadman: bool = False, estop_required: bool = False, camera_timeout_s: float = 0.14
    ) -> None:
        self._camera_names, self._deadman = robot.camera_names, deadman
        self._sources = {reader.topic: _Source(reader, robot) for reader in joint_topics(robot)}
        self.subscriptions: tuple[Endpoint, ...] = tuple(s.reader.endpoint for s in self._sources.values())
        self._camera_timeout_ns, self._period_ns = round(camera_timeout_s * NS_PER_S), round(robot.period_s * NS_PER_S)
        self._stopped = self._pressed = self.ending = False
        self._unheard = estop_required  # whether an emergency stop is pressed is not known yet
        self._beat_ns: int | None = None  # steady time of the policy's last heartbeat
        self._held_ns: int | None = None  # when the deadman switch last said true
        self._speaker: int | None = None  # number of the last chunk of the policy that is heard
        self._spoke_ns = 0  # steady time of that chunk
        self._told_ns = 0  # stamp of the last heartbeat
        self._stranger_ns: int | None = None  # when the last chunk of a second policy came
        self._refusals: dict[str, tuple[str, int | None]] = {}  # by action: why, and since when it is over
        self.acted = Reason.NONE
        self.begin()

    def begin(self) -> None:
        """A new episode: the scene may have been laid anew. An emergency stop stays."""
        self._cameras: dict[str, _Camera] = {}
        for source in self._sources.values():
            source.seen = None
        self._event = Reason.NONE  # a fault of one message, which the next may already hide

    # ---- operator ----
    def estop(self, pressed: bool) -> None:
        self._pressed, self._stopped, self._unheard = pressed, self._stopped or pressed, False

    def resume(self) -> None:
        """Ends an emergency stop that is no longer pressed; TransportError for one that is."""
        if self._pressed or self._unheard:
            got, remedy = "true", "Release the emergency stop."
            if self._unheard:
                got, remedy = "nothing yet", "Start what publishes it."
            raise TransportError(explain(EMERGENCY_STOP.topic, "false before it can be resumed", got, remedy))
        self._stopped = False

    def deadman(self, held: bool, received_ns: int) -> None:
        self._held_ns = received_ns if held else None

    # ---- time ----
    def clock_set(self, by_ns: int) -> None:
        """All stamps are further on by `by_ns`, the sensors' too as soon as they have noticed."""
        self.begin()
        self._told_ns += by_ns
        for source in self._sources.values():
            if source.newest is not None:
                source.newest = (source.newest[0] + by_ns, *source.newest[1:])
        self._event = Reason.CLOCK

    # ---- joint states ----
    def on_joints(self, topic: str, message: JointState) -> None:
        """A message of one of `subscriptions`."""
        self._event = self._sources[topic].take(message) or self._event

    @property
    def joints(self) -> tuple[int, np.ndarray, np.ndarray | None] | None:
        """Stamp, positions float64[D] and velocities, or None for these, in the robot's order: the newest of each topic
        and the oldest of their stamps. None while one of them is not usable."""
        known = [(source.reader, source.newest) for source in self._sources.values() if source.newest is not None]
        if len(known) < len(self._sources):
            return None
        velocities = [(topic, newest[2]) for topic, newest in known if newest[2] is not None]
        return (
            min(newest[0] for _, newest in known),
            merged((topic, newest[1]) for topic, newest in known),
            merged(velocities) if len(velocities) == len(known) else None,
        )

    # ---- policy ----
    def beat(self, now: Now) -> bool:
        """A heartbeat came; True when it ends a silence."""
        away = self._beat_ns is not None and now.received_ns - self._beat_ns >= SILENCE_NS
        self._beat_ns = now.received_ns
        return away

    def silence_ns(self, now: Now) -> int | None:
        """How long the policy has been silent; None before its first heartbeat, for which the loop has a word."""
        return None if self._beat_ns is None else now.steady_ns - self._beat_ns

    def new_sender(self) -> None:
        """The policy was away: whoever comes next is heard."""
        self._speaker = self._stranger_ns = None

    def stranger(self, number: int, now: Now) -> bool:
        """A chunk of this number is not of the policy that is alive, but of a second one."""
        if self._speaker is None or abs(number - self._speaker) <= MAX_GAP:
            self._spoke_ns = now.steady_ns
            return False
        if now.steady_ns - self._spoke_ns >= REPLACED_NS:
            self.new_sender()
            return False
        self._stranger_ns = now.steady_ns
        return True

    def heard(self, number: int) -> None:
        """A chunk of this number was taken."""
        self._speaker = number

    def pictures(self, heartbeat: Status, now: Now) -> None:
        """Stamp, fingerprint and period of each camera's newest picture, if the policy tells them."""
        self._told_ns = now.stamp_ns - (now.steady_ns - now.received_ns)
        for name in self._camera_names:
            stamp, picture = heartbeat.values.get(STAMP_KEY + name), heartbeat.values.get(PICTURE_KEY + name, "")
            if stamp is None or not _STAMP.fullmatch(stamp):
                continue
            known, period = self._cameras.get(name), heartbeat.values.get(SPACING_KEY + name, "")
            period_ns = int(period) if _STAMP.fullmatch(period) else 0
            if period_ns <= 0 and known is not None:  # not told, by a policy node that has seen few, or is an older one
                period_ns = int(stamp) - known.stamp_ns if int(stamp) > known.stamp_ns else known.period_ns
            if known is not None and picture == known.picture:
                self._cameras[name] = replace(known, stamp_ns=int(stamp), period_ns=period_ns)
            else:
                joints = self.joints
                self._cameras[name] = _Camera(int(stamp), picture, int(stamp), joints and joints[1], period_ns)

    # ---- driver ----
    def driver(self, action: str, refusal: str, now: Now) -> None:
        """Goals for the arm are refused or aborted, or nobody is there to take them; "": they are taken again."""
        if refusal:
            self._refusals[action] = refusal, None
        elif action in self._refusals:
            self._refusals[action] = self._refusals[action][0], now.steady_ns

    def _refused(self, now: Now) -> list[str]:
        return [why for why, over in self._refusals.values() if over is None or now.steady_ns - over < DRIVER_NS]

    # ---- answers ----
    def doubt(self, now: Now) -> Reason:
        """The weightiest reason not to move, NONE for none."""
        if self._stopped or self._unheard:
            return Reason.EMERGENCY_STOP
        if self.ending:
            return Reason.OPERATOR
        if self._deadman and (self._held_ns is None or now.steady_ns - self._held_ns >= SILENCE_NS):
            return Reason.DEADMAN
        if self._two_policies(now):
            return Reason.SECOND_POLICY
        if self._event:
            return self._event
        if self._refused(now):
            return Reason.DRIVER
        if (self.silence_ns(now) or 0) >= SILENCE_NS:
            return Reason.HEARTBEAT
        if any(source.late(now) for source in self._sources.values()):
            return Reason.JOINT_STATE_STALE
        return Reason.CAMERA if self._blind(now) else Reason.NONE

    def next_ns(self, now: Now) -> int:
        """Steady time at which the policy or the joint states will have been silent for too long; far off for never."""
        ages_ns = [now.stamp_ns - s.newest[0] for s in self._sources.values() if s.newest is not None]
        if (silence_ns := self.silence_ns(now)) is not None:
            ages_ns.append(silence_ns)
        left_ns = [SILENCE_NS - age for age in ages_ns if age < SILENCE_NS]
        return now.steady_ns + min(left_ns, default=NS_PER_S)

    def act(self, now: Now) -> Reason:
        """`doubt`, which is now acted upon: what one message did is dealt with."""
        self.acted, self._event = self.doubt(now), Reason.NONE
        return self.acted

    def faults(self, now: Now, running: bool) -> dict[str, str]:
        """What /diagnostics says of it."""
        joints = [source.fault or source.late(now) for source in self._sources.values()]
        out = {"joint_states": "; ".join(filter(None, joints))} if any(joints) else {}
        silence_ns = self.silence_ns(now)
        if not running and (silence_ns is None or silence_ns >= SILENCE_NS):  # of a moving arm the loop says it
            out["heartbeat"] = "no heartbeat of a policy"
        if running and (blind := self._blind(now)):
            out["camera"] = blind
        if refused := self._refused(now):
            out["driver"] = "; ".join(refused)
        if self._two_policies(now):
            out["policies"] = "chunks of a second policy: end one of them"
        if self._unheard:
            out["estop"] = f"not heard yet: publish false on {EMERGENCY_STOP.topic}, again and again"
        elif self._stopped:
            out["estop"] = "pressed" if self._pressed else "released; resume with /vla/control"
        return out

    def _two_policies(self, now: Now) -> bool:
        return self._stranger_ns is not None and now.steady_ns - self._stranger_ns < STRANGER_NS

    def _blind(self, now: Now) -> str:
        """Which camera the policy has no picture of, and why; "" when it has all."""
        for name, camera in self._cameras.items():
            # What a policy that fell silent has seen since is not known: its silence has a reason of its own.
            age_ns = min(now.stamp_ns, self._told_ns + HEARTBEAT_PERIOD_NS * 3 // 2) - camera.stamp_ns
            late_ns = max(self._camera_timeout_ns, min(LATE_PERIODS * camera.period_ns, _MOST_LATE_NS))
            if age_ns > late_ns + (camera.period_ns or self._period_ns):
                return f"camera {name}: its newest picture is {age_ns / 1e6:.0f} ms old"
            same_ns = camera.stamp_ns - camera.first_ns
            if not camera.picture or same_ns < self._camera_timeout_ns or camera.joints is None:
                continue
            if (joints := self.joints) is None:
                continue
            travel = float(np.max(np.abs(joints[1] - camera.joints), initial=0.0))
            if travel > FROZEN_TRAVEL:
                return f"camera {name}: the same picture for {same_ns / 1e6:.0f} ms while a joint moved by {travel:.2f}"
        return ""
