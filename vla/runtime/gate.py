"""The last function before actuation. Every command passes it: pass, reshape or stop, with a reason. numpy only.

It fails closed: what it cannot judge (no joint state, no heartbeat, NaN, a stale stamp) is a stop. A stop is a brake
at the acceleration limits followed by holding the last command; it is left only at rest, with healthy inputs and an
action from a newer chunk than the one that was stopped. The reference of all limits is the Gate's own last command,
not the noisy measurement; a measurement far from it is a fault: the command brakes, and then goes back to where the arm
is, so that one that was paused does not leap when it follows again. Robots that state jerk limits move under
vla.runtime.jerk, the others under vla.runtime.limits.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, ObservationError, explain
from vla.runtime.jerk import Aim, JerkMotion, Sample
from vla.runtime.limits import JointLimits, approach_speed, braked, rest_position, scale_into, velocity_bounds
from vla.runtime.reasons import Reason as Reason
from vla.runtime.reasons import Verdict as Verdict
from vla.types import NS_PER_S, ControlMode

TRACKING_LAG_S = 0.2  # an arm may be where it was commanded so long ago
MAX_PERIODS = 2.0  # a longer gap between ticks: the arm has come to rest at the last command, so velocity is zero


# Pauses, not faults: the arm brakes, and the next healthy action may go on at once. A camera is among them because one
# lost picture is ordinary; without pictures no newer chunk comes anyway.
_UNLATCHED = (Reason.WAITING, Reason.NO_ACTION, Reason.CAMERA)
_LIMITS = {name: Reason[name.upper()] for name in ("velocity", "acceleration", "jerk", "position")}


@dataclass(frozen=True)
class Decision:
    """values: float64[D], what may be sent. reason: NONE for a pass."""

    verdict: Verdict
    reason: Reason
    values: np.ndarray


class Gate:
    """One gate per arm. `reset` before the first `step`.

    tool_position: q float64[D] -> float64[3], needed for the workspace box (without it the box must be infinite).
    gripper: indices of gripper joints (by default those with "gripper" or "finger" in their name). They are limited
    like every joint, but apart from the arm: an opening gripper neither slows the arm nor counts as a reshape.
    Timeouts: age at which a joint state, a heartbeat or (max_action_age_s, default two periods) an action is a fault.
    max_tracking_error: rad or m between a measured arm joint and where it was commanded in the last TRACKING_LAG_S.
    slew_per_s: operational-space control only, change per second of the action values.
    carries_stop: every command is sent with the stop that follows it, so after a gap between ticks the arm stands where
    that stop has brought it, not at the last command. Jerk limits only.
    driven: joints that are sent as velocities, without a place of their own: at rest their command is where they are.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        tool_position: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        gripper: tuple[int, ...] | None = None,
        heartbeat_timeout_s: float = 0.15,
        joint_state_timeout_s: float = 0.15,
        max_action_age_s: float | None = None,
        max_tracking_error: float = 0.2,
        slew_per_s: float = 20.0,
        carries_stop: bool = False,
        driven: tuple[int, ...] = (),
    ) -> None:
        self.embodiment = embodiment
        self._osc = embodiment.control_mode is ControlMode.OSC_DELTA
        names = embodiment.command_names
        if gripper is None:
            gripper = embodiment.gripper_joints
        self._is_gripper = np.isin(np.arange(len(names)), gripper)
        self._arm, self._gripper = np.flatnonzero(~self._is_gripper), np.flatnonzero(self._is_gripper)
        self._limits = None if self._osc else JointLimits.of(embodiment)
        self._box = np.array([embodiment.workspace_lower, embodiment.workspace_upper], np.float64)
        self._tool_position = tool_position
        self._boxed = not self._osc and bool(np.any(np.isfinite(self._box)))
        if self._boxed and tool_position is None:
            remedy = "The embodiment has a workspace box: pass FK."
            raise ConfigError(explain("tool_position", "a function q -> metres", "none", remedy))
        self._absolute = self._is_gripper | (embodiment.action_space == "joint_position")
        period_s = embodiment.period_s
        self._period_s = period_s
        self._heartbeat_ns = round(heartbeat_timeout_s * NS_PER_S)
        self._joint_state_ns = round(joint_state_timeout_s * NS_PER_S)
        self._action_ns = round((2 * period_s if max_action_age_s is None else max_action_age_s) * NS_PER_S)
        self._max_tracking_error = max_tracking_error
        self._slew_per_s = slew_per_s
        self._carries_stop, self._driven = carries_stop, np.isin(np.arange(len(names)), driven)
        jerky = self._limits is not None and self._limits.jerk is not None
        self._motion = JerkMotion(self._limits, period_s) if jerky and self._limits is not None else None
        self._now_ns: int | None = None
        self._sent: deque[tuple[int, np.ndarray]] = deque()  # (time, command) of the last TRACKING_LAG_S
        self._command = np.zeros(len(names))
        self._velocity = np.zeros(len(names))
        self._forget()

    # ---- state ----
    def reset(self, positions: np.ndarray, now_ns: int) -> None:
        """Start at rest from measured joint positions float64[D]; clears a stop. Call it only while the arm stands."""
        self._command = np.zeros(len(self._command)) if self._osc else self._checked(positions)
        self._rest()
        self._now_ns = now_ns
        self._forget()

    def _rest(self) -> None:
        """The arm stands at the last command."""
        self._velocity = np.zeros(len(self._command))
        if self._motion is not None:
            self._motion.reset(self._command)

    def _forget(self) -> None:
        self._first = True  # the first step after a reset has one whole period, even in the same instant
        self._latched = Reason.NONE
        self._latched_chunk = self._newest_chunk = -1
        self._back_to: np.ndarray | None = None
        self._sent.clear()
        self._last_target: np.ndarray | None = None

    def _checked(self, positions: np.ndarray) -> np.ndarray:
        values = np.array(positions, np.float64)
        if values.shape != self._command.shape or not np.all(np.isfinite(values)):
            expected = f"{len(self._command)} finite joint positions"
            raise ObservationError(explain("positions", expected, values, "Check the joint states."))
        return values

    @property
    def command(self) -> np.ndarray:
        """float64[D], a copy of the last command: the configuration that deltas start from."""
        return self._command.copy()

    @property
    def velocity(self) -> np.ndarray:
        """float64[D], velocity of the last command."""
        return self._velocity.copy()

    def tool(self) -> np.ndarray | None:
        """float64[3] metres, tool point of the last command; None without a `tool_position`."""
        return None if self._tool_position is None else np.asarray(self._tool_position(self._command), np.float64)

    @property
    def stopped(self) -> Reason:
        """The fault that holds the arm, NONE while it may move."""
        return self._latched

    @property
    def at_rest(self) -> bool:
        return not np.any(self._velocity) and (self._motion is None or self._motion.at_rest)

    def silent(self, now_ns: int, heartbeat_ns: int | None) -> bool:
        """No sign of life of the policy for as long as the heartbeat timeout, or none at all."""
        return heartbeat_ns is None or now_ns - heartbeat_ns >= self._heartbeat_ns

    def clock_set(self, by_ns: int) -> None:
        """All times are further on by `by_ns` from here on: brake, as time has passed all the same."""
        if self._now_ns is not None:
            self._now_ns += by_ns
            self._sent.clear()
            self._latch(Reason.CLOCK)

    # ---- one tick ----
    def step(
        self,
        now_ns: int,
        target: np.ndarray | None,
        *,
        due_ns: int = 0,
        chunk_number: int = -1,
        positions: np.ndarray | None = None,
        positions_stamp_ns: int | None = None,
        heartbeat_ns: int | None = None,
        fault: Reason = Reason.NONE,
    ) -> Decision:
        """Judge one target and return what may be sent.

        target: float64[D], joint positions or operational-space values; None when no action is due.
        due_ns, chunk_number: of the action. positions: float64[D] measured, stamped positions_stamp_ns.
        heartbeat_ns: when the policy last gave a sign of life. fault: a reason found upstream (or by the operator).
        """
        if self._now_ns is None:
            raise ConfigError(explain("gate", "reset(positions, now_ns) first", "step()", "Give the gate a start."))
        if now_ns < self._now_ns:
            # No elapsed time can be told, so nothing moves this tick; braking goes on from the next.
            self._now_ns = now_ns
            self._sent.clear()
            self._latch(Reason.CLOCK)
            return Decision(Verdict.STOP, Reason.CLOCK, self._command.copy())
        self._newest_chunk = max(self._newest_chunk, chunk_number)
        dt = (now_ns - self._now_ns) / NS_PER_S
        self._sent.append((self._now_ns, self._command))
        while len(self._sent) > 1 and self._sent[1][0] <= now_ns - TRACKING_LAG_S * NS_PER_S:
            self._sent.popleft()
        self._now_ns = now_ns
        if self._first or dt > MAX_PERIODS * self._period_s:
            if self._motion is not None and self._carries_stop and not self._first:
                self._motion.catch_up(dt - self._period_s)
                self._adopt()
            else:
                self._rest()
            self._first = False
            dt = self._period_s

        found = (
            fault
            or self.health(now_ns, positions, positions_stamp_ns, heartbeat_ns)
            or self._action_fault(now_ns, target, due_ns)
        )
        if found and found not in _UNLATCHED:
            self._latch(found)
        elif self._latched:
            fresh = target is not None and chunk_number > self._latched_chunk
            if fresh and self.at_rest:
                self._latched, self._back_to = Reason.NONE, None
        reason = self._latched or found
        if reason or target is None:
            self._last_target = None
            if self._goes_back(found, positions) and self._back_to is not None:
                self._follow_any(self._back_to, dt)
            else:
                self._stop(dt)
                self._settle(positions if np.any(self._driven) else None)
            return Decision(Verdict.STOP, reason or Reason.NO_ACTION, self._command.copy())
        reason = self._follow_any(target, dt)
        if reason is Reason.KINEMATICS:
            self._latch(reason)
            return Decision(Verdict.STOP, reason, self._command.copy())
        return Decision(Verdict.RESHAPE if reason else Verdict.PASS, reason, self._command.copy())

    def _follow_any(self, target: np.ndarray, dt: float) -> Reason:
        if self._osc:
            return self._follow_osc(target, dt)
        target = np.asarray(target, np.float64)
        return self._follow(target, dt) if self._motion is None else self._follow_smoothly(target, dt, self._motion)

    def health(
        self, now_ns: int, positions: np.ndarray | None, stamp_ns: int | None, heartbeat_ns: int | None
    ) -> Reason:
        """The fault in the inputs that do not depend on an action, NONE when they are healthy. Changes nothing."""
        if heartbeat_ns is None or now_ns - heartbeat_ns >= self._heartbeat_ns:
            return Reason.HEARTBEAT
        if positions is None or stamp_ns is None or not np.all(np.isfinite(positions)):
            return Reason.JOINT_STATE_INVALID
        if abs(now_ns - stamp_ns) >= self._joint_state_ns:
            return Reason.JOINT_STATE_STALE
        if not self._osc:
            if np.shape(positions) != self._command.shape:
                return Reason.JOINT_STATE_INVALID
            if np.max(np.abs(self.behind(positions))[self._arm], initial=0.0) > self._max_tracking_error:
                return Reason.TRACKING
        return Reason.NONE

    def behind(self, positions: np.ndarray) -> np.ndarray:
        """float64[D], the way from measured positions to where the joints were commanded within TRACKING_LAG_S."""
        path = [self._command, *(command for _, command in self._sent)]
        return np.clip(positions, np.min(path, axis=0), np.max(path, axis=0)) - positions

    def _goes_back(self, found: Reason, positions: np.ndarray | None) -> bool:
        """Nothing but an arm that did not follow holds the command, which goes to where that arm was found, once: with
        joint states that are wrong, following them would never end."""
        if self._latched is not Reason.TRACKING or found not in (Reason.NONE, Reason.TRACKING, *_UNLATCHED):
            return False
        moved = np.array([command - self._command for _, command in self._sent])
        stands = self.at_rest and not np.any(moved[:, ~self._driven])
        if self._back_to is None and stands and found is Reason.TRACKING and positions is not None:
            self._back_to = np.where(self._is_gripper, self._command, positions)
        return self._back_to is not None

    def _settle(self, positions: np.ndarray | None) -> None:
        if positions is not None and self.at_rest and np.shape(positions) == self._command.shape:
            known = self._driven & np.isfinite(positions)
            self._command = np.where(known, positions, self._command)
            self._rest()

    def _action_fault(self, now_ns: int, target: np.ndarray | None, due_ns: int) -> Reason:
        if target is None:
            return Reason.NO_ACTION
        if np.shape(target) != self._command.shape or not np.all(np.isfinite(target)):
            return Reason.ACTION_INVALID
        if now_ns - due_ns > self._action_ns:
            return Reason.ACTION_STALE
        if due_ns - now_ns > self._period_s * NS_PER_S:
            return Reason.ACTION_EARLY
        return Reason.NONE

    def _latch(self, reason: Reason) -> None:
        # The first reason stays until the arm may move again: later ones are usually its consequences.
        self._latched = self._latched or reason
        self._latched_chunk = self._newest_chunk

    def _stop(self, dt: float) -> None:
        if self._limits is None:
            self._command = np.zeros(len(self._command))
            return
        if self._motion is not None:
            if dt > 0.0:
                self._motion.commit(self._motion.braked(dt))
                self._adopt()
            return
        self._velocity = braked(self._velocity, self._limits, dt)
        self._emit(dt)

    def _adopt(self) -> None:
        assert self._motion is not None
        self._command, self._velocity = self._motion.position, self._motion.velocity

    def _emit(self, dt: float) -> None:
        assert self._limits is not None
        low = np.minimum(self._limits.lower, self._command)  # rounding only: the bounds keep q inside already
        high = np.maximum(self._limits.upper, self._command)
        self._command = np.minimum(np.maximum(self._command + self._velocity * dt, low), high)

    # ---- joint positions ----
    def _follow(self, target: np.ndarray, dt: float) -> Reason:
        """Move towards `target` within all limits; returns what limited the arm, NONE when it arrives."""
        assert self._limits is not None
        limits, position = self._limits, self._command
        if dt <= 0.0:
            return Reason.ACCELERATION  # the same instant again: nothing may move
        # From outside the limits a goal may lie between here and the limit, but nothing moves unless it is asked to.
        goal = np.minimum(np.maximum(target, np.minimum(limits.lower, position)), np.maximum(limits.upper, position))
        outside = bool(np.any((goal != target)[self._arm]))
        wanted = (goal - position) / dt
        low, high = velocity_bounds(position, self._velocity, limits, dt)
        desired = self._desired(goal, wanted, dt)
        velocity = np.empty_like(position)
        velocity[self._arm], worst = scale_into(desired[self._arm], low[self._arm], high[self._arm])
        fingers = self._gripper
        velocity[fingers] = np.minimum(np.maximum(desired[fingers], low[fingers]), high[fingers])
        reason = Reason.POSITION if outside else Reason.NONE
        if worst >= 0:
            reason = self._what_limits(int(self._arm[worst]), desired, dt)
        elif not reason and np.any(np.abs(velocity - wanted)[self._arm] * dt > 1e-9):
            reason = Reason.ACCELERATION  # slowing down ahead of a goal that it would overshoot
        try:
            allowed = self._inside_workspace(velocity, dt)
        except Exception:  # whatever fails here must end in a brake, never in a dead control loop
            self._stop(dt)
            return Reason.KINEMATICS
        if allowed is not velocity:
            reason, velocity = Reason.WORKSPACE, allowed
        self._velocity = velocity
        self._emit(dt)
        return reason

    def _desired(self, goal: np.ndarray, wanted: np.ndarray, dt: float) -> np.ndarray:
        """Velocity to aim at, float64[D].

        A delta action starts from the last command, so its goal is a velocity and nothing can lag behind. Absolute
        goals (and the gripper) are approached so that they are met without overshoot: relative to the goal's own
        velocity, the remaining distance is closed no faster than it can be braked.
        """
        assert self._limits is not None
        previous, self._last_target = self._last_target, goal
        moving = np.zeros_like(goal)
        if previous is not None:
            speed = (goal - previous) / dt
            moving = np.where(self._is_gripper, 0.0, np.clip(speed, -self._limits.velocity, self._limits.velocity))
        lag = goal - self._command - moving * dt
        closing = np.sign(lag) * approach_speed(np.abs(lag), self._limits.acceleration, dt)
        return np.where(self._absolute | (self._back_to is not None), moving + closing, wanted)

    def _what_limits(self, joint: int, desired: np.ndarray, dt: float) -> Reason:
        assert self._limits is not None
        if abs(desired[joint]) > self._limits.velocity[joint]:
            return Reason.VELOCITY
        change = self._limits.acceleration[joint] * dt
        return Reason.ACCELERATION if abs(desired[joint] - self._velocity[joint]) > change else Reason.POSITION

    def _follow_smoothly(self, target: np.ndarray, dt: float, motion: JerkMotion) -> Reason:
        """`_follow` under jerk limits."""
        assert self._limits is not None
        limits, position = self._limits, self._command
        if dt <= 0.0:
            return Reason.JERK
        goal = np.minimum(np.maximum(target, np.minimum(limits.lower, position)), np.maximum(limits.upper, position))
        wanted = goal - position
        previous, self._last_target = self._last_target, goal
        moving, met = np.zeros_like(goal), np.zeros(len(goal), np.bool_)
        if previous is not None:
            moving = np.clip((goal - previous) / dt, -limits.velocity, limits.velocity)
            met = np.abs(position - previous) <= 1e-9
        absolute = self._absolute | (self._back_to is not None)
        moving = np.where(self._is_gripper, 0.0, np.where(absolute, moving, wanted / dt))
        sample = motion.towards(Aim(goal, moving, absolute, met), dt)
        # One factor for the arm, as in `scale_into`: a joint that moves the other way brakes and has no share in it.
        got = sample.position - position
        short = ~self._is_gripper & (np.abs(got - wanted) > 1e-9)
        reason = Reason.POSITION if np.any((goal != target)[self._arm]) else Reason.NONE
        if np.any(short):
            share = np.ones_like(goal)
            np.divide(got, wanted, out=share, where=short & (got * wanted > 0.0) & (np.abs(got) < np.abs(wanted)))
            worst = int(np.argmin(share)) if np.min(share) < 1.0 else int(np.flatnonzero(short)[0])
            sample = motion.drawn_back(sample, position + np.min(share) * wanted, ~self._is_gripper, dt)
            reason = _LIMITS[motion.reason(goal, worst, dt)]
        try:
            allowed = self._smoothly_inside(sample, motion, dt)
        except Exception:  # whatever fails here must end in a brake, never in a dead control loop
            self._stop(dt)
            return Reason.KINEMATICS
        if allowed is not sample:
            reason, sample = Reason.WORKSPACE, allowed
        motion.commit(sample)
        self._adopt()
        return reason

    def _smoothly_inside(self, sample: Sample, motion: JerkMotion, dt: float) -> Sample:
        """`_inside_workspace` under jerk limits, where joints stop one after the other: more points of the way."""
        if not self._boxed:
            return sample
        brake = motion.braked(dt)
        now_outside = self._distance_outside(self._command)
        for share in (1.0, 0.5, 0.25):
            tried = sample
            if share < 1.0:
                tried = motion.place(brake.position + share * (sample.position - brake.position), dt)
            if all(self._distance_outside(q) <= now_outside + 1e-9 for q in tried.path(17)):
                return tried
        return brake

    # ---- what follows the last command ----
    def fork(self) -> Gate:
        """A copy that may be driven ahead without moving this one."""
        out = copy.copy(self)
        out._motion = None if self._motion is None else self._motion.fork()
        return out

    def ahead(self, target: np.ndarray) -> None:
        """One period on towards `target` float64[D], without any check of inputs: for a fork."""
        self._follow_any(target, self._period_s)

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """(velocity, acceleration) float64[D] at the last command; the latter is 0 where jerk is not limited."""
        if self._motion is None:
            return self._velocity, np.zeros(len(self._command))
        return self._motion.state[1:]

    def stop_path(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """The stop that follows the last command: positions, velocities, accelerations, each float64[N, D], N >= 1,
        and the seconds between rows, the first of which is that long after the command. The last row is at rest."""
        if self._motion is not None:
            return self._motion.rest_of_stop()
        fork, rows = self.fork(), list[tuple[np.ndarray, np.ndarray]]()
        while not rows or not fork.at_rest:
            fork._stop(self._period_s)
            rows.append((fork._command, fork._velocity))
        positions, velocities = (np.array(column) for column in zip(*rows))
        return positions, velocities, np.zeros_like(positions), self._period_s

    def _inside_workspace(self, velocity: np.ndarray, dt: float) -> np.ndarray:
        """`velocity`, or as much of it as leaves room to brake inside the box (braking itself always may).

        Mixes of an allowed velocity and the braked one keep all joint limits, because those are convex in velocity.
        """
        if not self._boxed:
            return velocity
        assert self._limits is not None
        brake = braked(self._velocity, self._limits, dt)
        now_outside = self._distance_outside(self._command)
        for share in (1.0, 0.5, 0.25):
            candidate = velocity if share == 1.0 else brake + share * (velocity - brake)
            after = self._command + candidate * dt
            rest = rest_position(after, candidate, self._limits)
            # `after`, three quarters of the way (half the braking time) and rest stand for the whole braking path.
            if all(
                self._distance_outside(q) <= now_outside + 1e-9 for q in (rest, after + 0.75 * (rest - after), after)
            ):
                return candidate
        return brake

    def _distance_outside(self, q: np.ndarray) -> float:
        """Metres between the tool point and the box, 0 inside."""
        assert self._tool_position is not None
        point = np.asarray(self._tool_position(q), np.float64)
        if point.shape != (3,) or not np.all(np.isfinite(point)):
            raise ConfigError(explain("tool_position", "3 finite metres", point, "Check the robot model."))
        return float(np.linalg.norm(np.maximum(np.maximum(self._box[0] - point, point - self._box[1]), 0.0)))

    # ---- operational space ----
    def _follow_osc(self, target: np.ndarray, dt: float) -> Reason:
        goal = np.minimum(np.maximum(np.asarray(target, np.float64), -1.0), 1.0)
        reason = Reason.POSITION if np.any(goal != target) else Reason.NONE
        change = (goal - self._command)[self._arm]
        allowed = self._slew_per_s * max(dt, 0.0)
        largest = float(np.max(np.abs(change), initial=0.0))
        values = goal.copy()
        if largest > allowed:
            values[self._arm] = self._command[self._arm] + change * (allowed / largest)
            reason = Reason.SLEW
        self._command = values
        return reason
