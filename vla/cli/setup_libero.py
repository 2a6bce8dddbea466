"""`vla setup libero`: the logic is in sim/libero/setup.py; here are only the arguments."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", help="folder with the LIBERO meshes and textures (else VLA_LIBERO_ASSETS)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    from sim.libero.setup import setup

    done = setup(assets=args.assets)
    if args.json:
        print(json.dumps(done, indent=2, default=str))
    return 0
