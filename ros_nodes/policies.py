"""Finds the policy that a policy node runs, by name. The only room of ros_nodes that may load weights, lazily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla import configs
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, explain
from vla.policy import Policy
from vla.resources import bundle_path, load_embodiment


def load_policy(
    name: str,
    embodiment: str | None = None,
    threads: int | None = None,
    decoder: str = "autoregressive",
    options: Sequence[str] = (),
) -> Policy:
    """name: a bundle folder, the name of a shipped bundle, "hold", or a .npy file with action chunks float[N, T, A] to
    play one after the other. embodiment: the robot; a bundle must have been made for it, the others need it.
    threads: CPU threads of torch in this process. decoder, options: of a bundle, a name in configs/decoder and its
    settings as key=value.

    Raises BundleError for a bundle that is incomplete, EmbodimentMismatch for one of another robot.
    """
    robot = None if embodiment is None else load_embodiment(embodiment)
    if name == "hold" or name.endswith(".npy"):
        if robot is None:
            raise ConfigError(explain("embodiment", f"a robot for {name!r}", "none", "Pass --embodiment."))
        return _scripted(Path(name), robot) if name != "hold" else _hold(robot)
    from policies.vla_policy import VlaPolicy

    policy = VlaPolicy.from_bundle(bundle_path(name), configs.load("decoder", decoder, options), threads=threads)
    if robot is not None:
        robot.require_same(policy.embodiment, f"robot {robot.name!r} and policy {name!r}")
    policy.warm_up()
    return policy


def _hold(robot: Embodiment) -> Policy:
    from policies.hold import HoldPolicy

    return HoldPolicy(robot)


def _scripted(path: Path, robot: Embodiment) -> Policy:
    from policies.hold import ScriptedPolicy

    try:
        chunks = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(explain(str(path), "a .npy file of numbers", str(error), "Save it with numpy.save.")) from error
    if chunks.ndim != 3 or chunks.shape[2] != robot.action_dim:
        raise DataError(
            explain(str(path), f"float[N, T, {robot.action_dim}]", list(chunks.shape), "Save chunks of actions.")
        )
    return ScriptedPolicy(robot, [np.asarray(chunk, np.float32) for chunk in chunks])
