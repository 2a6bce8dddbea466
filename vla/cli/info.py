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
    from vla.checkpoints.bundle import load

    bundle = load(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    manifest = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    return {
        "path": str(path),
        "size_mb": round(size / 1e6, 2),
        "parameters": int(sum(p.numel() for p in bundle.model.parameters())) if hasattr(bundle, "model") else None,
        **manifest,
    }


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 400 else text[:400] + " ..."
