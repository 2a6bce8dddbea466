"""Finds the policy that a policy node runs, by name. The only room of ros_nodes that may load weights, lazily."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np

from policies.parts import Parts
from vla.data.transforms import fits
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, EmbodimentMismatch, explain
from vla.policy import Policy, PolicyWrapper
from vla.resources import BUNDLE_MARKER, bundle_path, is_address, load_embodiment


def load_policy(
    name: str,
    embodiment: str | None = None,
    threads: int | None = None,
    parts: Parts | None = None,
    device: str = "cpu",
) -> Policy:
    """name: a bundle folder, the name of a shipped bundle, the ws:// address of `vla serve`, "hold", or a .npy file
    with action chunks float[N, T, A] to play one after the other. embodiment: the robot; a bundle must have been made
    for it, the others need it. With one the policy's `embodiment` is that robot as it is described now, corrected since
    the training or not: its topics, joints and limits. The size of its pictures stays the policy's.
    threads: CPU threads of torch in this process. parts: what a bundle is run with; the others take none. device: where
    a bundle runs, see `device_named` of policies.vla_policy.

    Raises BundleError for a bundle that is incomplete, EmbodimentMismatch for one of another robot, ConfigError for a
    device that is not there.
    """
    robot = None if embodiment is None else load_embodiment(embodiment)
    parts = parts or Parts()
    if device not in ("auto", "cpu") and not is_bundle(name):
        remedy = "Leave it out; the device of a remote policy is its server's."
        raise ConfigError(explain("device", "a bundle to run there", repr(name), remedy))
    if name == "hold" or name.endswith(".npy"):
        if robot is None:
            raise ConfigError(explain("embodiment", f"a robot for {name!r}", "none", "Pass --embodiment."))
        if parts != Parts():
            raise ConfigError(explain("decoder, pruning, reuse, ensembling", "a bundle", repr(name), "Leave them out."))
        return _scripted(Path(name), robot) if name != "hold" else _hold(robot)
    if is_address(name):
        if robot is None:
            raise ConfigError(explain("embodiment", f"a robot for {name!r}", "none", "Pass --embodiment."))
        from policies.remote.attach import attached

        return _on_robot(attached(name, robot, parts)[0], robot, name)
    policy, inner = parts.load(bundle_path(name), device, threads)
    if robot is not None:
        policy = _on_robot(policy, robot, name)
    inner.warm_up()
    return policy


def differences(robot: Embodiment, trained: Embodiment) -> list[str]:
    """Those of Embodiment.differences, and cameras whose pictures cannot stand for the ones of the training."""
    found = robot.differences(trained)
    for mine, theirs in zip(robot.cameras, trained.cameras):
        if mine.name == theirs.name and not fits(mine.height, mine.width, theirs):
            sizes = f"{mine.height}x{mine.width} does not fit {theirs.height}x{theirs.width}"
            found.append(f"camera {mine.name}: {sizes}, nor is it larger in that proportion")
    return found


class _OnRobot(PolicyWrapper):
    """A policy on a robot whose description is not the one that it was trained with."""

    def __init__(self, policy: Policy, robot: Embodiment):
        super().__init__(policy)
        self._robot = robot

    @property
    def embodiment(self) -> Embodiment:
        return self._robot


def check_robot(robot: Embodiment, trained: Embodiment, name: str) -> None:
    """EmbodimentMismatch where a policy that was made for `trained` may not move `robot`. name: of the policy."""
    if found := differences(robot, trained):
        raise EmbodimentMismatch(
            f"robot {robot.name!r} and policy {name!r}: {len(found)} difference(s): {'; '.join(found)}. "
            "Use a policy made for this robot."
        )


def _on_robot(policy: Policy, robot: Embodiment, name: str) -> Policy:
    trained = policy.embodiment
    check_robot(robot, trained, name)
    pairs = zip(robot.cameras, trained.cameras)
    cameras = tuple(replace(mine, height=theirs.height, width=theirs.width) for mine, theirs in pairs)
    now = replace(robot, cameras=cameras)
    return policy if now == trained else _OnRobot(policy, now)


def facts_of(name: str, parts: Parts, device: str = "cpu") -> dict[str, str]:
    """What decides the chunks of `load_policy(name, parts=parts, device=device)` beside their inputs, as text: the hash
    of the bundle, the configs of its parts, the version of torch, cpu or which GPU. {} for policies without weights and
    for those elsewhere."""
    if not is_bundle(name):
        return {}
    record = Path(bundle_path(name)) / BUNDLE_MARKER
    content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return {
        "bundle": str(content.get("hashes", {}).get("content", "")),
        "parts": json.dumps(parts.describe(), sort_keys=True),
        "torch": metadata.version("torch"),
        "device": _device(device),
    }


def is_bundle(name: str) -> bool:
    """Whether a policy of this name has weights here."""
    return not (name == "hold" or name.endswith(".npy") or is_address(name))


def _device(name: str) -> str:
    import torch

    from policies.vla_policy import device_named

    device = device_named(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
