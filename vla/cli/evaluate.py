"""`vla eval`: success of a policy on unseen seeds, in process, with the controls that show it sees and listens."""

from __future__ import annotations

import argparse
import json
import sys

from vla.cli.job import add_override_arguments, compose_job

EXAMPLES = """  vla eval                                             the shipped policy, 200 unseen scenes
  vla eval policy=outputs/train/bundle episodes=50
  vla eval controls=[none,blank,shuffled,swapped]      does it see, does it listen?
  vla eval out=outputs/eval                            again: continues where it was killed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "eval", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    job = compose_job(args, "eval")
    if job is None:
        return 0
    from sim.evaluate import measure

    reports = measure(job, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({control: report.to_dict() for control, report in reports.items()}, indent=2))
        return 0
    for control, report in reports.items():
        print(f"{job.policy} on {job.env}, control {control}\n{report.table()}\n")
    return 0
