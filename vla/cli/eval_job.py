"""The arguments of `vla eval`: those of `sim.evaluate`, and whose policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.evaluate import EvalConfig


@dataclass(frozen=True)
class EvalJob(EvalConfig):
    """policy: bundle folder or name of a shipped bundle. threads: CPU threads of torch, 0 for all."""

    policy: str = "tabletop"
    device: str = "cpu"
    threads: int = 0

    def identity(self, policy_id: str) -> dict[str, Any]:
        """Where the bundle lay and how many threads ran it decide no episode."""
        data = super().identity(policy_id)
        del data["threads"], data["device"]
        return data


def run_evaluation(job: EvalJob, progress: bool) -> Any:
    """A `sim.evaluate.Report`."""
    from policies.vla_policy import VlaPolicy
    from sim.evaluate import evaluate
    from vla.resources import bundle_path

    policy = VlaPolicy.from_bundle(bundle_path(job.policy), device=job.device, threads=job.threads or None)
    return evaluate(policy, job, policy.bundle.fingerprint, progress=progress)
