"""`vla info BUNDLE`: what a trained bundle is, and whether its files are complete and unchanged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder, or the name of a shipped bundle")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    from vla.resources import bundle_path

    path = bundle_path(args.bundle)
    facts = describe(path)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(f"[bold]{key}[/bold]", _short(value))
    Console().print(table)
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Facts of a bundle; raises BundleError when it is incomplete or corrupt."""
    from vla.checkpoints.bundle import load, read_content

    content, bundle = read_content(path), load(path)
    robot, config = bundle.embodiment, bundle.config
    files = [file for file in path.iterdir() if file.is_file()]
    return {
        "path": str(path),
        "hash": bundle.fingerprint,
        "family": content["family"],
        "format_version": content["format_version"],
        "size_mb": round(sum(file.stat().st_size for file in files) / 1e6, 2),
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "robot": robot.name,
        "rate_hz": robot.rate_hz,
        "action": f"{robot.action_space}, {robot.rotation_format}: {' '.join(robot.action_names)}",
        "state": " ".join(robot.state_names),
        "cameras": ", ".join(f"{c.name} at {c.size} px" for c in config.cameras),
        "horizon": config.horizon,
        "heads": {
            head.name: head.kind
            + (f", {content['action_tokenizers'][head.name]['kind']} of {head.vocab}" if head.vocab else "")
            for head in config.heads
        },
        "observation_offsets": list(bundle.observation_offsets),
        "training": dict(bundle.training),
        "card": str(path / "CARD.md") if (path / "CARD.md").is_file() else None,
    }


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 400 else text[:400] + " ..."
