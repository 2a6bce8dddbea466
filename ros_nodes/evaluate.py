"""Success rate of a policy over ROS 2: the same seeds as in-process evaluation, through the real graph.

    python -m ros_nodes.evaluate --policy tabletop --episodes 200 --out runs/ros_eval

Writes episodes.jsonl (one line per episode, as it ends) and evaluation.json: success with 95 % Wilson intervals over
all and per family, and the measures of Graph.report().
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ros_nodes.graph import Graph, Outcome
from vla.errors import VlaError
from vla.files import write_text
from vla.runtime.summary import wilson_95

FIRST_SEED = 1_000_000  # seeds below are for demonstrations (sim.environment.EVAL_SEED_START; only the simulator
# node imports that room)


def rates(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """{"all" and each family: {episodes, successes, success_rate, wilson_95}}."""
    groups = {"all": list(outcomes)}
    for outcome in outcomes:
        groups.setdefault(outcome.task or "unknown", []).append(outcome)
    out = {}
    for name, group in groups.items():
        won, count = sum(o.success for o in group), len(group)
        interval = [round(bound, 4) for bound in wilson_95(won, count)]
        rate = round(won / count, 4) if count else None
        out[name] = {"episodes": count, "successes": won, "success_rate": rate, "wilson_95": interval}
    return out


def evaluate(graph: Graph, seeds: Iterable[int], **options: Any) -> dict[str, Any]:
    """Run one episode per seed through `graph` (not started yet) and return the evaluation, also when interrupted.

    options: of each reset (task, swap, instruction). Raises TransportError when a node dies.
    """
    graph.out.mkdir(parents=True, exist_ok=True)
    with graph, open(graph.out / "episodes.jsonl", "w", encoding="utf-8") as log:
        try:
            for seed in seeds:
                outcome = graph.run_episode(seed, **options)
                log.write(json.dumps(asdict(outcome)) + "\n")
                log.flush()
                won = sum(o.success for o in graph.outcomes)
                word = "success" if outcome.success else outcome.error or "failure"
                print(f"seed {seed}: {word} ({won}/{len(graph.outcomes)})", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted; evaluating what was run", file=sys.stderr)
    report = graph.report()
    stops = report.pop("stops", [])
    result = {"policy": graph.policy, "env": graph.env, "success": rates(graph.outcomes), **report, "stops": len(stops)}
    write_text(graph.out / "evaluation.json", json.dumps(result, indent=1))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ros_nodes.evaluate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--policy", required=True, help="bundle folder, name of a shipped bundle, expert or hold")
    parser.add_argument("--env", default="tabletop")
    parser.add_argument("--task", help="one family instead of all")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="first seed (default: %(default)s)")
    parser.add_argument("--swap", action="store_true", help="ask for another object in the very same scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--execute", type=int, default=8, help="actions of a chunk to run before the next")
    parser.add_argument("--lead", type=int, default=2, help="control periods that inference may take")
    parser.add_argument(
        "--realtime", action="store_true", help="real-time priority, for a machine busy with other work"
    )
    options = parser.parse_args(arguments)
    graph = Graph(
        options.env,
        options.policy,
        out=options.out,
        task=options.task,
        execute=options.execute,
        lead=options.lead,
        realtime=options.realtime,
        restart=("policy",),
    )
    try:
        more = {"swap": True} if options.swap else {}
        result = evaluate(graph, range(options.seed, options.seed + options.episodes), **more)
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
