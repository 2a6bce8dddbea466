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

import math
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from vla.embodiment import Embodiment, Joint
from vla.errors import ConfigError, explain, nearest
from vla.runtime.reasons import Reason


@dataclass(frozen=True)
class JointLimits:
    """float64[D] each; position in rad (m for sliding joints), per second, squared, cubed. jerk: None for no limit."""

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray | None = None

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
            for key in ("max_velocity", "max_acceleration", "max_jerk"):
                value = getattr(joint, key)
                if key == "max_jerk" and value is None:
                    continue
                if not (np.isfinite(value) and value > 0):
                    raise ConfigError(
                        explain(
                            f"{where}.{joint.name}.{key}", "a positive number", value, "Take it from the data sheet."
                        )
                    )
        without = [joint.name for joint in joints if joint.max_jerk is None]
        if without and len(without) < len(joints):
            raise ConfigError(
                explain(f"{where}.max_jerk", "a limit for every joint, or for none", f"none for {without}", "Add them.")
            )
        return cls(
            np.array([j.lower for j in joints], np.float64),
            np.array([j.upper for j in joints], np.float64),
            np.array([j.max_velocity for j in joints], np.float64),
            np.array([j.max_acceleration for j in joints], np.float64),
            None if without else np.array([j.max_jerk for j in joints], np.float64),
        )


# ---- URDF ----
def urdf_limits(path: str | Path) -> dict[str, tuple[float, float, float]]:
    """{joint: (lower, upper, velocity)} of every movable joint of a URDF file, xacro already expanded.

    As urdfdom reads it: revolute and prismatic joints must state a limit, whose bounds default to 0; a continuous joint
    has none but may state a velocity. A joint that states no velocity has no limit on it. ConfigError for a file that
    is no URDF, with the reason.
    """
    try:
        root = ElementTree.fromstring(Path(path).read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise ConfigError(explain("urdf", "a readable URDF file", f"{path}: {error}", "Check the file.")) from error
    if root.tag != "robot":
        raise ConfigError(
            explain("urdf", "a <robot>", f"<{root.tag}> in {path}", "Expand xacro first: xacro FILE > robot.urdf.")
        )
    out: dict[str, tuple[float, float, float]] = {}
    for joint in root.iterfind("joint"):
        name, kind, limit = joint.get("name", ""), joint.get("type", ""), joint.find("limit")
        if kind not in ("revolute", "prismatic", "continuous"):
            continue
        if limit is None and kind != "continuous":
            raise ConfigError(
                explain(f"urdf joint {name!r}", "a <limit>, as a revolute or prismatic joint needs", "none", "Add it.")
            )
        stated = {} if limit is None else limit.attrib
        try:
            lower, upper = (float(stated.get(key, 0.0)) for key in ("lower", "upper"))
            velocity = float(stated.get("velocity", math.inf))
        except ValueError as error:
            raise ConfigError(explain(f"urdf joint {name!r}", "numbers", dict(stated), "Expand xacro.")) from error
        if kind == "continuous":
            lower, upper = -math.inf, math.inf
        out[name] = (lower, upper, velocity if velocity > 0 else math.inf)
    return out


def within_urdf(embodiment: Embodiment, path: str | Path | None = None) -> Embodiment:
    """The embodiment with the stricter of its own limits and those of a URDF (its own `urdf`, if none is given).

    ConfigError for a joint that the URDF lacks, and for limits that leave nothing.
    """
    path = path or embodiment.urdf
    if not path:
        return embodiment
    stated = urdf_limits(path)
    joints: list[Joint] = []
    for joint in embodiment.joints:
        if joint.name not in stated:
            raise ConfigError(
                f"embodiment {embodiment.name!r}.joints: {joint.name!r} is no movable joint of {path}. "
                + nearest(joint.name, stated)
            )
        lower, upper, velocity = stated[joint.name]
        both = (max(lower, joint.lower), min(upper, joint.upper))
        if not both[0] < both[1]:
            got = f"[{lower:g}, {upper:g}] in the URDF, [{joint.lower:g}, {joint.upper:g}] in the embodiment"
            raise ConfigError(explain(f"limits of {joint.name}", "ranges that overlap", got, "Correct one of them."))
        joints.append(replace(joint, lower=both[0], upper=both[1], max_velocity=min(velocity, joint.max_velocity)))
    return replace(embodiment, joints=tuple(joints))


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


def limit_tool(
    action: np.ndarray, embodiment: Embodiment, period_s: float, tool: np.ndarray | None = None
) -> tuple[np.ndarray, Reason]:
    """The cartesian limits of an end-effector delta, before inverse kinematics; the reason if it had to change.

    action: finite float[A]. Entries with unit m are translation, with unit rad rotation; both shrink by one common
    factor to keep the tool speed limits, so that the tool stays on its screw motion. Then, with the tool point known
    (tool, float[3] metres), the part of the translation that leaves the workspace box is cut off: the tool slides
    along a wall instead of stopping at it. The gripper is left as it is.
    """
    if embodiment.action_space != "ee_delta":
        return action, Reason.NONE
    translation = np.array([unit == "m" for unit in embodiment.action_units])
    rotation = np.array([unit == "rad" for unit in embodiment.action_units])
    reason, factor = Reason.NONE, 1.0
    for part, limit in ((translation, embodiment.max_tool_speed_m_s), (rotation, embodiment.max_tool_speed_rad_s)):
        length = float(np.linalg.norm(action[part]))
        if length > limit * period_s:
            factor = min(factor, limit * period_s / length)
    if factor < 1.0 - 1e-6:  # float32 actions at exactly the limit are within it
        action, reason = np.where(translation | rotation, action * factor, action), Reason.TOOL_SPEED
    if tool is not None and np.count_nonzero(translation) == 3:
        # Outside the box, a wall is where the tool stands: only inward motion is left.
        low, high = np.minimum(embodiment.workspace_lower, tool), np.maximum(embodiment.workspace_upper, tool)
        moved = action[translation]
        kept = np.minimum(np.maximum(moved, low - tool), high - tool)
        if np.any(np.abs(kept - moved) > 1e-9):
            action, reason = action.copy(), Reason.WORKSPACE
            action[translation] = kept
    return action, reason
