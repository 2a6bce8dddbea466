"""`vla eval`: success of a policy on unseen seeds, in process, with the controls that show it sees and listens."""

from __future__ import annotations

import argparse
import json
import sys

from vla.cli.job import add_override_arguments, compose_job

EXAMPLES = """  vla eval                                             the shipped policy, 200 unseen scenes
  vla eval policy=outputs/train/bundle episodes=50
  vla eval control=blank                               blanked images: success must fall to chance
  vla eval out=outputs/eval.json                       again: continues where it was killed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "eval", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    job = compose_job(args, "eval")
    if job is None:
        return 0
    from vla.cli.eval_job import run_evaluation

    report = run_evaluation(job, progress=sys.stderr.isatty())
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table())
    return 0
