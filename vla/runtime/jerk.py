"""Jerk-limited motion of sampled position commands: the mathematics below the Gate, for robots that state a jerk limit.

A stream of samples c_k at times t_k has velocity, acceleration and jerk by divided differences, which on an even grid
are the usual differences and on any grid are averages of the derivatives of every function through the samples:

    V_k = (c_k - c_{k-1}) / d_k        A_k = (V_k - V_{k-1}) / ((d_k + d_{k-1}) / 2)
    J_k = (A_k - A_{k-1}) / ((d_k + d_{k-1} + d_{k-2}) / 3)                              d_k = t_k - t_{k-1}

The invariant kept for every joint: there is a *stop*, a function through the last three samples whose first three
derivatives keep their limits and which comes to rest inside the position limits. It is the parabola through the three
samples, continued by the time-optimal jerk-limited stop. A tick either emits the next value of that stop, whatever the
time since the last tick, or a sample whose differences keep the limits and from which a new stop begins that is
checked before the sample is sent. Differences of values of one such function are averages of its derivatives (Peano
kernel), so no later sequence of ticks can leave the limits while braking. Nothing is proved about a candidate but by
checking it, so the search for a good one needs no proof.

A library for time-optimal motion (ruckig) would give the same stop; it knows no position limits and has no wheel for
Linux on ARM, where this runs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from vla.runtime.limits import JointLimits

# A grid of candidates at once, refined: numpy's cost is in the calls, not in the numbers.
_SHARES = np.linspace(0.0, 1.0, 25)[:, None]
_SEARCH_ROUNDS = 3
_TIGHT = 1.0 + 1e-9  # a sample at exactly a limit is within it
_STOP_ROWS = 32
_NEAR = 1e-9  # rad or m: as good as there


@dataclass(frozen=True)
class Stop:
    """The time-optimal stop from position q, velocity v, acceleration a; float64[D] each.

    Jerk -sign*J for t1, none for t2, +sign*J for t3, then v = a = 0 at `rest`.
    """

    q: np.ndarray
    v: np.ndarray
    a: np.ndarray
    jerk: np.ndarray  # signed: of the first phase
    t1: np.ndarray
    t2: np.ndarray
    t3: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, q: np.ndarray, v: np.ndarray, a: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray) -> Stop:
        """The acceleration goes to a peak p against the motion, stays there if p is the limit, and back to zero."""
        after = coasting(v, a, jerk)
        sign = np.where(after != 0.0, np.sign(after), np.sign(v))
        forward, push = sign * v, sign * a  # mirrored: the stop pushes backwards
        peak = np.minimum(np.sqrt(np.maximum(jerk * forward + 0.5 * push * push, 0.0)), acceleration)
        t1 = np.maximum(push + peak, 0.0) / jerk
        t3 = peak / jerk
        left = forward + push * push / (2 * jerk) - peak * peak / jerk
        t2 = np.maximum(left, 0.0) / np.maximum(peak, 1e-300)
        stop = cls(q, v, a, -sign * jerk, t1, t2, t3, q)
        return cls(q, v, a, stop.jerk, t1, t2, t3, stop._at(t1 + t2 + t3)[0])

    @property
    def duration(self) -> np.ndarray:
        return self.t1 + self.t2 + self.t3

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(position, velocity, acceleration) t >= 0 seconds into the stop; exactly at rest from its end on."""
        over = t >= self.duration
        q, v, a = self._at(t)
        return np.where(over, self.rest, q), np.where(over, 0.0, v), np.where(over, 0.0, a)

    def _at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        jerk = self.jerk
        s = np.minimum(t, self.t1)
        a = self.a + jerk * s
        v = self.v + (self.a + 0.5 * jerk * s) * s
        q = self.q + (self.v + (0.5 * self.a + jerk * s / 6) * s) * s
        s = np.minimum(np.maximum(t - self.t1, 0.0), self.t2)
        q, v = q + (v + 0.5 * a * s) * s, v + a * s
        s = np.minimum(np.maximum(t - self.t1 - self.t2, 0.0), self.t3)
        q, v, a = q + (v + (0.5 * a - jerk * s / 6) * s) * s, v + (a - 0.5 * jerk * s) * s, a - jerk * s
        return q, v, a

    def span(self) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) position of the stop, its start included.

        Its turning points are its start, its rest and, where it starts against its own direction, the one between.
        """
        sign = -np.sign(self.jerk)
        against = sign * self.v < 0
        push, jerk = sign * self.a, np.abs(self.jerk)
        root = np.sqrt(np.maximum(push * push + 2 * jerk * sign * self.v, 0.0))
        turn = np.where(against, np.maximum(push - root, 0.0) / np.maximum(jerk, 1e-300), 0.0)
        dip = self._at(np.minimum(turn, self.t1))[0]
        ends = (self.q, self.rest, dip)
        return np.minimum.reduce(ends), np.maximum.reduce(ends)

    def joined(self, other: Stop, mask: np.ndarray) -> Stop:
        """`other` where mask is true, else self."""
        return Stop(*(np.where(mask, getattr(other, key), getattr(self, key)) for key in self.__dataclass_fields__))


def coasting(v: np.ndarray, a: np.ndarray, jerk: np.ndarray) -> np.ndarray:
    """Velocity after the acceleration has been brought to zero as fast as the jerk allows."""
    return v + a * np.abs(a) / (2 * jerk)


@dataclass(frozen=True)
class Sample:
    """A checked next sample: position, its differences, and the stop that begins at it (or goes on, `since` > 0)."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    stop: Stop
    since: np.ndarray
    dt: float

    def path(self, points: int) -> np.ndarray:
        """Positions float64[points, D] along the stop, evenly in time: its end first, the sample itself last."""
        left = float(np.max(self.stop.duration - self.since, initial=0.0))
        return self.stop.at(self.since + left * np.linspace(1.0, 0.0, points)[:, None])[0]


@dataclass(frozen=True)
class Aim:
    """Where a tick wants to be. goal: float64[D]. velocity: float64[D], of the goal itself. absolute: bool[D], the goal
    is a place to be met (else only its velocity matters). met: bool[D], the last sample was on the last goal."""

    goal: np.ndarray
    velocity: np.ndarray
    absolute: np.ndarray
    met: np.ndarray


class JerkMotion:
    """The last three samples of one arm and the stop that continues them. Arrays are replaced, never written into, so
    `fork` may share them."""

    def __init__(self, limits: JointLimits, period_s: float) -> None:
        assert limits.jerk is not None
        self.limits, self.period_s = limits, period_s
        self.reset(np.zeros(len(limits.lower)))

    def reset(self, position: np.ndarray) -> None:
        """At rest at `position` for longer than three samples."""
        zero = np.zeros_like(position)
        self.position, self.velocity, self.acceleration = position.copy(), zero, zero
        self._dt, self._dt_before = self.period_s, self.period_s
        self._stop, self._since = self._stop_from(position, zero, zero), zero

    def fork(self) -> JerkMotion:
        return copy.copy(self)

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(position, velocity, acceleration) at the last sample of the function through the samples."""
        return self._stop.at(self._since)

    @property
    def at_rest(self) -> bool:
        return not np.any(self.velocity) and bool(np.all(self._since >= self._stop.duration))

    @property
    def time_to_rest_s(self) -> float:
        return float(np.max(self._stop.duration - self._since, initial=0.0))

    # ---- samples ----
    def braked(self, dt: float) -> Sample:
        """The next value of the stop, dt > 0 seconds after the last sample: always within limits."""
        since = self._since + dt
        return self._sample(self._stop.at(since)[0], dt, self._stop, since)

    def commit(self, sample: Sample) -> None:
        """`sample` has been sent."""
        self.position, self.velocity, self.acceleration = sample.position, sample.velocity, sample.acceleration
        self._stop, self._since = sample.stop, sample.since
        self._dt, self._dt_before = sample.dt, self._dt

    def catch_up(self, dt: float) -> None:
        """dt > one period went by in which the arm followed the stop: the samples are those it has passed."""
        period_s = self.period_s
        for step in (dt - 2 * period_s, period_s, period_s) if dt > 2 * period_s else (dt - period_s, period_s):
            self.commit(self.braked(step))

    def rest_of_stop(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """(positions, velocities, accelerations) float64[N, D] of the stop that goes on from here, and the seconds
        between rows: one period, or so many that N stays within _STOP_ROWS. The last row is at rest."""
        periods = max(1, int(np.ceil(self.time_to_rest_s / self.period_s - 1e-9)))
        every = -(-periods // _STOP_ROWS)
        count = -(-periods // every)
        t = np.arange(1, count + 1)[:, None] * (every * self.period_s)
        return (*self._stop.at(self._since + t), every * self.period_s)

    def drawn_back(self, sample: Sample, to: np.ndarray, mask: np.ndarray, dt: float) -> Sample:
        """`sample`, its joints in `mask` moved towards `to` (not past the brake) where the limits allow it."""
        brake = self.braked(dt).position
        low, high = np.minimum(brake, sample.position), np.maximum(brake, sample.position)
        tried = np.minimum(np.maximum(to, low), high)
        ok = mask & (tried != sample.position) & self._allowed(tried, dt)
        return self._merged(tried, ok, sample, dt) if np.any(ok) else sample

    def place(self, wanted: np.ndarray, dt: float) -> Sample:
        """`wanted` where it keeps all limits, the next value of the stop elsewhere."""
        brake = self.braked(dt)
        return self._merged(wanted, self._allowed(wanted, dt), brake, dt)

    def towards(self, aim: Aim, dt: float) -> Sample:
        """As near to the goal as all limits allow, each joint for itself, without running past it.

        A goal that was met and can be met again is met, however it moves. One that was not is approached as one that
        goes on at its own velocity: it is met only where the samples could then follow it at once, else the stop in
        its frame must not overshoot it.
        """
        brake = self.braked(dt)
        near, far = brake.position, self._within_differences(aim.goal, dt)
        ok = (far == aim.goal) & (aim.met | self._joins(aim, dt)) & self._allowed(far, dt)
        if not np.all(ok):
            best, beyond = np.where(ok, far, near), far
            for _ in range(_SEARCH_ROUNDS):
                tried = best + _SHARES * (beyond - best)  # [K, D]
                fits = self._allowed(tried, dt) & self._falls_short(tried, aim, brake, dt)
                last = np.where(np.any(fits, axis=0), len(_SHARES) - 1 - np.argmax(fits[::-1], axis=0), 0)
                last = np.where(ok, len(_SHARES) - 1, last)[None]
                after = np.minimum(last + 1, len(_SHARES) - 1)
                best = np.take_along_axis(tried, last, 0)[0]
                beyond = np.take_along_axis(tried, after, 0)[0]
            ok = ok | (best != near)
            far = best
        return self._merged(far, ok, brake, dt)

    def reason(self, target: np.ndarray, joint: int, dt: float) -> str:
        """Which limit keeps `joint` from `target`: "velocity", "acceleration", "jerk" or "position"."""
        velocity, acceleration, jerk = (x[joint] for x in self._differences(target, dt))
        limits = self.limits
        assert limits.jerk is not None
        if abs(velocity) > limits.velocity[joint] * _TIGHT:
            return "velocity"
        if abs(acceleration) > limits.acceleration[joint] * _TIGHT:
            return "acceleration"
        return "jerk" if abs(jerk) > limits.jerk[joint] * _TIGHT else "position"

    # ---- parts ----
    def _stop_from(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> Stop:
        assert self.limits.jerk is not None
        return Stop.of(q, v, a, self.limits.acceleration, self.limits.jerk)

    def _differences(self, x: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        velocity = (x - self.position) / dt
        acceleration = (velocity - self.velocity) / (0.5 * (dt + self._dt))
        jerk = (acceleration - self.acceleration) / ((dt + self._dt + self._dt_before) / 3)
        return velocity, acceleration, jerk

    def _sample(self, x: np.ndarray, dt: float, stop: Stop, since: np.ndarray) -> Sample:
        velocity, acceleration, _ = self._differences(x, dt)
        return Sample(x, velocity, acceleration, stop, since, dt)

    def _next_state(self, x: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """(velocity, acceleration) at x of the parabola through it and the last two samples."""
        velocity, acceleration, _ = self._differences(x, dt)
        return velocity + 0.5 * dt * acceleration, acceleration

    def _merged(self, x: np.ndarray, ok: np.ndarray, brake: Sample, dt: float) -> Sample:
        """x with a stop of its own where ok, the brake elsewhere."""
        stop = self._stop_from(x, *self._next_state(x, dt))
        return self._sample(
            np.where(ok, x, brake.position), dt, brake.stop.joined(stop, ok), np.where(ok, 0.0, brake.since)
        )

    def _within_differences(self, x: np.ndarray, dt: float) -> np.ndarray:
        """x, moved into the interval that the limits of velocity, acceleration and jerk leave (empty: its middle)."""
        limits = self.limits
        assert limits.jerk is not None
        jerk = limits.jerk * ((dt + self._dt + self._dt_before) / 3)
        half = 0.5 * (dt + self._dt)
        low = np.maximum(-limits.acceleration, self.acceleration - jerk)
        high = np.minimum(limits.acceleration, self.acceleration + jerk)
        low = np.maximum(-limits.velocity, self.velocity + half * low)
        high = np.minimum(limits.velocity, self.velocity + half * high)
        return np.minimum(np.maximum(x, self.position + low * dt), self.position + high * dt)

    def _allowed(self, x: np.ndarray, dt: float) -> np.ndarray:
        """bool[D]: the differences at x keep their limits, and a stop from there stays inside."""
        limits, (velocity, acceleration, jerk) = self.limits, self._differences(x, dt)
        assert limits.jerk is not None
        v = velocity + 0.5 * dt * acceleration
        fastest = np.maximum(np.abs(v), np.abs(coasting(v, acceleration, limits.jerk)))
        low, high = self._stop_from(x, v, acceleration).span()
        # From outside the limits the way back in is free, and nothing else.
        floor = np.minimum(limits.lower, x)
        ceiling = np.maximum(limits.upper, x)
        floor = np.where(x < self.position, limits.lower, floor)
        ceiling = np.where(x > self.position, limits.upper, ceiling)
        return (
            (np.abs(velocity) <= limits.velocity * _TIGHT)
            & (np.abs(acceleration) <= limits.acceleration * _TIGHT)
            & (np.abs(jerk) <= limits.jerk * _TIGHT)
            & (fastest <= limits.velocity * _TIGHT)
            & (low >= floor - 1e-12)
            & (high <= ceiling + 1e-12)
        )

    def _joins(self, aim: Aim, dt: float) -> np.ndarray:
        """bool[D]: with the goal met now, the next samples can follow it at its own constant velocity."""
        limits = self.limits
        assert limits.jerk is not None
        velocity, acceleration, _ = self._differences(aim.goal, dt)
        step = limits.jerk * self.period_s
        turn = (np.where(aim.absolute, aim.velocity, velocity) - velocity) / self.period_s
        return (np.abs(turn) <= limits.acceleration) & (np.abs(turn - acceleration) <= step) & (np.abs(turn) <= step)

    def _falls_short(self, x: np.ndarray, aim: Aim, brake: Sample, dt: float) -> np.ndarray:
        """bool[D]: coming from the brake, the stop from x in the goal's frame does not run past the goal.

        Nor may x have braked too much already, so that the goal is missed on this side: the brake's own end is better.
        """
        jerk = self.limits.jerk
        assert jerk is not None
        v, a = self._next_state(x, dt)
        _, brake_v, brake_a = brake.stop.at(brake.since)
        side = np.sign(aim.goal - brake.position)
        low, high = self._stop_from(x - aim.goal, v - aim.velocity, a).span()
        left = side * coasting(v - aim.velocity, a, jerk)
        least = np.minimum(side * coasting(brake_v - aim.velocity, brake_a, jerk), 0.0)
        place = np.where(side > 0, high <= _NEAR, low >= -_NEAR) & (left >= least - _NEAR)
        speed = side * (coasting(v, a, jerk) - aim.velocity) <= _NEAR
        return np.where(aim.absolute, place, speed)
