"""Draws how every reward term went in a run of `ibisagent train rl`, from what its last checkpoint remembers.

    python benchmarks/curves.py runs/rl-nano -o curves.png [--smooth 9]

Thin lines are the updates, thick ones means over `--smooth` of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from transformers.trainer_utils import get_last_checkpoint

SHOWN = {
    "score/answer": "S_ans",
    "score/format": "S_format",
    "score/click": "S_click",
    "score/progress": "S_pseg",
    "score/length": "S_len",
    "score/total": "total",
    "rollout/iou": "IoU of what is there",
    "rollout/turns": "turns",
}


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that `ibisagent train rl` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--smooth", type=int, default=9, help="updates that a thick line averages")
    options = parser.parse_args()
    checkpoint = get_last_checkpoint(str(options.run / "trainer")) if (options.run / "trainer").is_dir() else None
    if checkpoint is None:
        parser.error(f"{options.run}: holds no checkpoint of a run; give the folder 'out' of its recipe")
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_bytes())["log_history"]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, SHOWN.items(), strict=True):
        points = np.array([(one["step"], one[name]) for one in history if name in one], float).reshape(-1, 2)
        axis.plot(*points.T, color="0.75", linewidth=0.8)
        if len(points) >= options.smooth:
            window = np.ones(options.smooth) / options.smooth
            axis.plot(*(np.convolve(column, window, mode="valid") for column in points.T), color="C0", linewidth=2)
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
