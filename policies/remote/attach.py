"""A remote policy by its address, with what its robot adds to it here. numpy, websockets and msgpack only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from policies.remote.client import RemotePolicy
from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain
from vla.policy import Policy

if TYPE_CHECKING:
    from policies.parts import Parts


def attached(address: str, robot: Embodiment, parts: Parts) -> tuple[Policy, RemotePolicy]:
    """The policy at `address` with the reuse and ensembling of `parts` around it, which remember and so belong to this
    robot, and the remote policy itself.

    Decoder and pruning are the server's. Naming them here states which ones they have to be: ConfigError when the
    server runs its bundle with others, and for reuse where it has no pruning. As RemotePolicy otherwise.
    """
    remote = RemotePolicy(address, robot)
    wanted = json.loads(json.dumps(parts.describe()))
    if parts.reuse is not None and remote.hello.parts.get("pruning") is None:
        remote.close()
        remedy = "Start `vla serve` with --pruning score, which drops none."
        raise ConfigError(explain("reuse", "a server that names the important visual tokens", "one without", remedy))
    for group, theirs in remote.hello.parts.items():
        mine = wanted.get(group)
        if mine is not None and mine != theirs:
            remote.close()
            raise ConfigError(
                explain(group, f"the server's, {theirs}", mine, "Start `vla serve` with it, or name that.")
            )
    return parts.around(remote), remote
