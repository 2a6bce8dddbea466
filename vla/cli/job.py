"""What `collect`, `train` and `eval` share: Hydra overrides in, one report out."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any


def add_override_arguments(parser: argparse.ArgumentParser, name: str, examples: str) -> None:
    """Positional overrides, --show and --json. name: the config in configs/ that the overrides apply to."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"changes to configs/{name}.yaml")
    parser.add_argument("--show", action="store_true", help="print the composed config as YAML and do nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, progress to stderr")
    parser.epilog = f"examples:\n{examples}\nEvery key:  vla {parser.prog.split()[-1]} --show"


def compose_job(args: argparse.Namespace, name: str) -> Any:
    """What configs/NAME.yaml constructs with the overrides; None when it was only to be shown."""
    from vla.cli.config import compose
    from vla.configs import build

    plain = compose(name, args.overrides, allow_missing=args.show)
    if args.show:
        import yaml

        print(yaml.safe_dump(plain, sort_keys=False), end="")
        return None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr if args.json else sys.stdout)
    return build(plain, name)


def run_job(args: argparse.Namespace, name: str, load: Callable[[], Callable[..., Any]]) -> int:
    """Compose, build, run, report. load: returns function(config, progress=bool) -> dataclass or dict."""
    config = compose_job(args, name)
    if config is not None:
        show(load()(config, progress=sys.stderr.isatty()), args.json)
    return 0


def show(report: Any, as_json: bool) -> None:
    """A dataclass or a dict, as JSON or as one line per entry."""
    values = asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(report or {})
    if as_json:
        print(json.dumps(values, indent=2, default=str))
        return
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        print(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
