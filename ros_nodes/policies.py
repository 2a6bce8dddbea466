"""Finds the policy that a policy node runs, by name. The only room of ros_nodes that may load weights, lazily."""

from __future__ import annotations

from vla.errors import ConfigError, explain
from vla.policy import Policy
from vla.resources import bundle_path, load_embodiment


def load_policy(name: str, embodiment: str | None = None, threads: int | None = None) -> Policy:
    """name: "hold", a bundle folder or the name of a shipped bundle. embodiment: the robot it must have been made for.
    threads: CPU threads of torch in this process.

    Raises BundleError for a bundle that is incomplete, EmbodimentMismatch for one of another robot.
    """
    robot = None if embodiment is None else load_embodiment(embodiment)
    if name == "hold":
        if robot is None:
            raise ConfigError(explain("embodiment", "a robot for the hold policy", "none", "Pass --embodiment."))
        from policies.hold import HoldPolicy

        return HoldPolicy(robot)
    from policies.vla_policy import VlaPolicy

    policy = VlaPolicy.from_bundle(bundle_path(name), threads=threads)
    if robot is not None:
        robot.require_same(policy.embodiment, f"robot {robot.name!r} and policy {name!r}")
    policy.warm_up()
    return policy
