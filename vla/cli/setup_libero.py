"""`vla setup libero`: the logic is in sim/libero/setup.py; here are only the arguments."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", metavar="DIR", help="remember this copy of the LIBERO meshes and textures")
    parser.add_argument("--download", action="store_true", help="fetch the assets when none are found")
    parser.add_argument("--constraints", metavar="FILE", help="pip constraints (default: the project's own)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    from sim.libero.setup import setup_libero

    def echo(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    report = setup_libero(args.assets, download=args.download, constraints=args.constraints, echo=echo)
    if args.json:
        print(json.dumps(asdict(report), indent=2, default=str))
    return 0
