"""Draw the loss curve of a training run: python benchmarks/training_curve.py RUN/curve.jsonl OUT.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def rows_with(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key; a run that was killed wrote some steps twice, the last one counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = {row["step"]: row[key] for row in rows if key in row}
    return sorted(values), [values[step] for step in sorted(values)]


def main(source: Path, target: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for axis, name in ((left, "look"), (middle, "tokens"), (right, "accuracy")):
        axis.plot(*rows_with(source, name), linewidth=0.8, label="training batch")
        axis.plot(*rows_with(source, f"val_{name}"), "o-", markersize=3, label="held-out episodes, averaged weights")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    left.set_title("where the words send the arm, standard deviations")
    middle.set_title("cross-entropy per action token")
    right.set_title("most likely token is the expert's")
    right.legend(fontsize=8)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
