"""`vla calibrate exit`: from when on a policy's tokens are sure enough to leave early, as settings of decoders."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.vla_policy import VlaPolicy
    from vla.models.vla import Prefix
    from vla.policy import InferContext
    from vla.types import Observation

SEED = 1_900_000  # scenes that neither demonstrations nor evaluations are likely to have
EPILOG = """The policy decodes through its whole depth. Of every token it is noted how sure the exit was, the difference
of its two best probabilities, and whether it would have said the same. Two Beta distributions are fitted to that
(FREE, Bae et al. 2023): the threshold is where the tokens that agree begin to prevail.

examples:
  vla calibrate exit --policy tabletop --head bins
  vla calibrate exit --policy tabletop --layer 2 --observations 300"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--policy", default="tabletop", metavar="BUNDLE", help="folder or shipped name")
    parser.add_argument("--head", default="", help="token head (default: the first)")
    parser.add_argument("--layer", type=int, default=0, help="exit after it (default: where the head was trained to)")
    parser.add_argument("--ratio", type=float, default=0.4, help="of the densities at the threshold (default: 0.4)")
    parser.add_argument("--observations", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--env", default="tabletop", help="environment (default: tabletop)")
    parser.add_argument("--task", default="all", help="task family (default: all take turns)")
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help=f"of the first episode (default: {SEED})")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    from policies.vla_policy import VlaPolicy
    from sim import decode_costs
    from sim.evaluate import EvalConfig
    from vla.decoding.autoregressive import AutoregressiveDecoder
    from vla.decoding.early_exit import AdaptiveEarlyExitDecoder, EarlyExitDecoder, fitted, measured
    from vla.errors import ConfigError, explain
    from vla.resources import bundle_path

    if args.observations < 1:
        raise ConfigError(explain("--observations", "at least 1", args.observations, "100 are enough."))
    AdaptiveEarlyExitDecoder(ratio=args.ratio)  # refuses what is out of range before episodes run
    greedy = AutoregressiveDecoder(head=args.head)
    policy = VlaPolicy.from_bundle(bundle_path(args.policy), greedy, args.device, args.threads)
    EarlyExitDecoder(args.layer, head=args.head).check(policy.bundle)
    config = EvalConfig(env=args.env, task=args.task, seed=args.seed)
    seen, _ = decode_costs.observations(policy, config, args.observations)
    confidences, agreed = measured(policy.bundle, prefixes(policy, seen), args.layer, args.head)
    mixture = fitted(confidences, agreed)
    (low_alpha, high_alpha), (low_beta, high_beta) = ((float(f"{v:.4g}") for v in row) for row in mixture.parameters)
    decoders = {
        "early_exit": EarlyExitDecoder(args.layer, mixture.threshold(args.ratio), args.head),
        "early_exit_adaptive": AdaptiveEarlyExitDecoder(
            args.layer, low_alpha, low_beta, high_alpha, high_beta, ratio=args.ratio, head=args.head
        ),
    }
    _show(args, len(seen), decoders, rows(confidences, agreed))
    return 0


def prefixes(policy: VlaPolicy, seen: Sequence[tuple[Observation, InferContext]]) -> Iterator[Prefix]:
    """What the policy makes of each observation, one at a time."""
    usual, policy.decoder = policy.decoder, (catch := _Catch())
    try:
        for observation, context in seen:
            policy.infer_batch([observation], [context])
            yield catch.prefix
    finally:
        policy.decoder = usual


class _Catch:
    """A decoder that keeps the prefix it is given, and answers zeros."""

    exact = False
    prefix: Any = None

    def check(self, bundle: Any) -> None: ...

    def decode(self, given: Any) -> Any:
        import numpy as np

        from vla.decoding.base import Decoded

        self.prefix, config = given.prefix, given.bundle.config
        return Decoded(np.zeros((given.batch, config.horizon, config.action_dim), np.float32), 0)


def rows(confidences: Sequence[float], agreed: Sequence[bool]) -> list[dict[str, float | None]]:
    """For thresholds 0, 0.1, ..., 0.9: the share of tokens at or above, and of those the share that agree with the
    whole model, None where there are none."""
    import numpy as np

    sure, same, out = np.asarray(confidences), np.asarray(agreed), []
    for threshold in np.arange(10) / 10:
        above = sure >= threshold
        agree = round(float(same[above].mean()), 4) if above.any() else None
        out.append({"threshold": float(threshold), "exits": round(float(above.mean()), 4), "agree": agree})
    return out


def options(name: str, decoder: Any) -> list[str]:
    """key=value of what differs from configs/decoder/NAME.yaml."""
    from vla.configs import describe, load

    usual = describe(load("decoder", name))
    return [f"{key}={value}" for key, value in describe(decoder).items() if value != usual[key]]


def _show(args: argparse.Namespace, count: int, decoders: dict[str, Any], table: list[dict[str, Any]]) -> None:
    from vla.configs import describe

    if args.json:
        configs = {name: describe(decoder) for name, decoder in decoders.items()}
        print(json.dumps({"policy": args.policy, "observations": count, "thresholds": table, **configs}, indent=2))
        return
    print(f"{count} observations; tokens that exit, and those of them that agree with the whole model:\n")
    for row in table:
        agree = "" if row["agree"] is None else f"{100 * row['agree']:7.1f} %"
        print(f"  threshold {row['threshold']:.1f} {100 * row['exits']:7.1f} % {agree}")
    for name, decoder in decoders.items():
        words = options(name, decoder)
        print(" ".join(["\nvla eval", f"policy={args.policy}", f"decoder={name}", *(f"decoder.{w}" for w in words)]))
        print(" ".join(["vla demo --policy", args.policy, "--decoder", name, *words]))
