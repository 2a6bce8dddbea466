"""Draw the losses of a training run: python benchmarks/training_curve.py RUN/curve.jsonl OUT.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "look": "where the words send the arm, standard deviations",
    "fast_tokens": "cross-entropy per FAST token",
    "fast_accuracy": "most likely FAST token is the expert's",
    "bins_tokens": "cross-entropy per bin token",
    "bins_accuracy": "most likely bin is the expert's",
    "flow": "squared error of the velocity",
    "parallel": "absolute error of the actions, normalised",
    "hybrid_noise": "squared error of the noise",
}


def rows_with(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key; a run that was killed wrote some steps twice, the last one counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = {row["step"]: row[key] for row in rows if key in row}
    return sorted(values), [values[step] for step in sorted(values)]


def main(source: Path, target: Path) -> None:
    keys = {key for line in source.read_text().splitlines() for key in json.loads(line)}
    names = sorted(key for key in keys if f"val_{key}" in keys and key not in ("loss", "keyframe", "chunk"))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        axis.plot(*rows_with(source, name), linewidth=0.8, label="training batch")
        axis.plot(*rows_with(source, f"val_{name}"), "o-", markersize=3, label="held-out episodes, averaged weights")
        axis.set_title(TITLES.get(name, name.replace("_", ", ")))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=8)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
