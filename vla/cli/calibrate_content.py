"""`vla calibrate content`: what a policy's training data looks like, written into its bundle."""

from __future__ import annotations

import argparse
import json

EPILOG = """By it, `vla doctor --live` tells swapped cameras, pictures that are upside down or mirrored, red and blue
swapped, degrees for radians, and joints with another sign or zero. `vla train` does this by itself; this command is for
bundles that were made before. Weights and hash of the bundle stay as they are.

examples:
  vla calibrate content --policy outputs/train/bundle --data data/tabletop"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--policy", required=True, metavar="BUNDLE", help="folder or shipped name; it is changed")
    parser.add_argument("--data", required=True, metavar="DATASET", help="what it was trained on, a LeRobotDataset")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from vla.checkpoints.bundle import describe_data, read_content
    from vla.data.content import content_of
    from vla.data.lerobot import LeRobotDataset
    from vla.embodiment import Embodiment
    from vla.resources import bundle_path

    path, dataset = bundle_path(args.policy), LeRobotDataset(args.data)
    manifest = read_content(path)
    robot = Embodiment.from_dict(manifest["embodiment"])
    dataset.embodiment().require_same(robot, f"data {args.data} and policy {args.policy!r}", "Take its own data.")

    def pictures(camera: str, rows: np.ndarray) -> np.ndarray:
        return np.stack([dataset.frame(camera, int(row)) for row in rows])

    cameras = [camera["name"] for camera in manifest["model"]["cameras"]]
    content = content_of(dataset, cameras, robot.state_names, np.arange(len(dataset)), pictures)
    describe_data(path, content)
    seen, ranges = list(content.cameras), {name: [r.min, r.max] for name, r in content.state.items()}
    if args.json:
        facts = {"path": str(path), "pictures": content.frames, "cameras": seen, "state": ranges}
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{path}: {content.frames} pictures of each camera: {', '.join(seen)}")
    for name, (low, high) in ranges.items():
        print(f"  {name}: {low:.4g} to {high:.4g}")
    return 0
