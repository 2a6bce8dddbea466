"""Bounded motion of sampled position commands: the mathematics below the Gate. numpy only.

A command stream q_0, q_1, ... has velocity v_k = (q_k - q_{k-1}) / dt_k and acceleration (v_k - v_{k-1}) / dt_k.
The invariant kept for every joint is

    v^2 / (2 a) <= room,        room = distance from q to the limit that v points at,

because then braking at `a` (v shrinks by a*dt per sample) stays inside *for any later sequence of dt*: one braking
sample moves (v - a dt) dt, less than the v dt - a dt^2 / 2 of continuous braking, so the invariant holds again.
Solving q + v dt + v^2 / (2 a) = limit for v gives the fastest next velocity that keeps it:

    v <= sqrt((a dt)^2 + 2 a room) - a dt
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain


@dataclass(frozen=True)
class JointLimits:
    """float64[D] each; position in rad (m for sliding joints), per second, per second squared."""

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @classmethod
    def of(cls, embodiment: Embodiment) -> JointLimits:
        """From Embodiment.joints; ConfigError for a limit that allows no motion or is not a number."""
        joints = embodiment.joints
        where = f"embodiment {embodiment.name!r}.joints"
        if not joints:
            raise ConfigError(explain(where, "one entry per commanded joint", "none", "List the joints and limits."))
        for joint in joints:
            if not joint.lower < joint.upper:
                got = f"[{joint.lower}, {joint.upper}]"
                raise ConfigError(explain(f"{where}.{joint.name}", "lower < upper", got, "Swap or correct the limits."))
            for key in ("max_velocity", "max_acceleration"):
                value = getattr(joint, key)
                if not (np.isfinite(value) and value > 0):
                    raise ConfigError(
                        explain(
                            f"{where}.{joint.name}.{key}", "a positive number", value, "Take it from the data sheet."
                        )
                    )
        return cls(
            np.array([j.lower for j in joints], np.float64),
            np.array([j.upper for j in joints], np.float64),
            np.array([j.max_velocity for j in joints], np.float64),
            np.array([j.max_acceleration for j in joints], np.float64),
        )


def braked(velocity: np.ndarray, limits: JointLimits, dt: float) -> np.ndarray:
    """Velocity after one sample of hardest braking, exactly zero at rest."""
    return np.sign(velocity) * np.maximum(np.abs(velocity) - limits.acceleration * dt, 0.0)


def rest_position(position: np.ndarray, velocity: np.ndarray, limits: JointLimits) -> np.ndarray:
    """Where hardest braking from here ends at the latest (continuous braking; sampled braking ends before it)."""
    return position + velocity * np.abs(velocity) / (2 * limits.acceleration)


def velocity_bounds(
    position: np.ndarray, velocity: np.ndarray, limits: JointLimits, dt: float
) -> tuple[np.ndarray, np.ndarray]:
    """The interval [low, high] of next velocities that keep all limits, now and while braking later; never empty.

    From outside the position limits only motion back inside (or standing still) is in the interval.
    """
    change = limits.acceleration * dt
    up = np.sqrt(change**2 + 2 * limits.acceleration * np.maximum(limits.upper - position, 0.0)) - change
    down = np.sqrt(change**2 + 2 * limits.acceleration * np.maximum(position - limits.lower, 0.0)) - change
    low = np.maximum(np.maximum(-limits.velocity, velocity - change), -down)
    high = np.minimum(np.minimum(limits.velocity, velocity + change), up)
    stop = braked(velocity, limits, dt)  # always allowed; also heals rounding that would leave the interval empty
    return np.minimum(low, stop), np.maximum(high, stop)


def approach_speed(distance: np.ndarray, acceleration: np.ndarray, dt: float) -> np.ndarray:
    """Fastest speed of this sample from which a standing goal `distance` away is met without overshoot.

    Exact for equal samples: n samples of braking cover n v dt - a dt^2 n (n - 1) / 2, with the smallest n for which
    v fits. Both arguments are >= 0.
    """
    unit = acceleration * dt * dt
    n = np.maximum(np.ceil((np.sqrt(1 + 8 * distance / unit) - 1) / 2), 1.0)
    return distance / (n * dt) + acceleration * dt * (n - 1) / 2


def scale_into(desired: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, int]:
    """Shrink the whole vector by one factor until no entry exceeds its bound, then meet the remaining bounds.

    The direction of motion is kept wherever it can be. A joint that still moves the other way has no share in the
    factor: it brakes as hard as it may, and the others do not wait for it.
    Returns (velocity, index of the limiting entry or -1).
    """
    bound = np.where(desired >= 0, high, low)
    factors = np.ones_like(desired)
    np.divide(bound, desired, out=factors, where=(np.abs(desired) > np.abs(bound)) & (bound * desired > 0))
    worst = int(np.argmin(factors))
    factor = factors[worst]
    scaled = desired * factor
    velocity = np.minimum(np.maximum(scaled, low), high)
    if factor < 1.0:
        return velocity, worst
    deviating = np.flatnonzero(velocity != scaled)
    return velocity, int(deviating[0]) if len(deviating) else -1
