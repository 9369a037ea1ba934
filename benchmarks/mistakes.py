"""Does the policy take back what was wrong, and does it better the masks that a user brings?

    IBIS_DATA=DATA python benchmarks/mistakes.py [--policy ibis-nano] [--segmenter ibis-click] [--seed 0] [--limit N]

On the patients of split "train", licence class "ok", that training leaves out, as examples are chosen by these results.
Mistakes: after the policy's own first turn, one positive click is given in its name at a random place outside mask and
object; then it goes on. Printed: the mean IoU after its first turn, after the click, of the masks that are handed out
and of the last ones, and how often it used an undo, with the last two of these cases alone. Brought: the ground truth,
corrupted as in training, is what the user brings to be refined.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

import numpy as np

from ibisagent.datasets import read_cases
from ibisagent.domain import Click, Completion, Mask, Masks, Reply, Undo
from ibisagent.environment import SegmentationEnv, rollout, turn_limit
from ibisagent.imaging.masks import iou
from ibisagent.policies import load_policy
from ibisagent.protocol import write
from ibisagent.query import target_of
from ibisagent.segmenters import load_segmenter
from ibisagent.training.click.states import corrupted, is_development

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="ibis-nano")
parser.add_argument("--segmenter", default="ibis-click")
parser.add_argument("--seed", type=int, default=0, help="of the wrong clicks and of what corrupts the masks")
parser.add_argument("--limit", type=int, default=None, help="only so many cases, spread over the data")


def reached(masks: Masks, ground_truth: Mask) -> float:
    """IoU of the only mask, 0 for none."""
    return next((iou(mask, ground_truth) for mask in masks.values()), 0.0)


def main() -> None:
    """Measure and print."""
    options = parser.parse_args()
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with the split 'train'")
    cases = read_cases(os.environ["IBIS_DATA"], split="train", licence_classes={"ok"}).filter(
        lambda row: row.mask is not None and is_development(row.patient)
    )
    if options.limit is not None:
        cases = cases.spread(options.limit)
    policy, segmenter = load_policy(options.policy, device="cpu"), load_segmenter(options.segmenter, device="cpu")
    random = np.random.default_rng(options.seed)
    mistakes, brought, undone = [], [], []
    for labelled in cases:
        [ground_truth] = labelled.targets.values()
        case = replace(labelled, targets={})
        env = SegmentationEnv(case, segmenter, dialect=policy.dialect, max_turns=turn_limit(policy))
        env.step(policy.respond([env.observation])[0])
        mask = next(iter(env.observation.masks.values()), None)
        if not env.done and mask is not None and mask.any() and not (mask | ground_truth).all():
            y, x = random.choice(np.argwhere(~mask & ~ground_truth)).tolist()
            wrong = write(Reply("", (Click(x, y, True, ""),)), case.image.size, dialect=policy.dialect)
            env.step(Completion(wrong))
            after, turns = reached(env.observation.masks, ground_truth), len(env.observation.turns)
            rollout(policy, [env])
            later = [action for turn in env.observation.turns[turns:] for action in turn.reply.actions]
            handed_out, last = (reached(one, ground_truth) for one in (env.episode().answer_masks, env.episode().masks))
            mistakes.append((iou(mask, ground_truth), after, handed_out, last))
            if any(isinstance(action, Undo) for action in later):
                undone.append((handed_out, last))
        start = corrupted(ground_truth, random)
        case = replace(case, start={target_of(case.query): start})
        env = SegmentationEnv(case, segmenter, dialect=policy.dialect, max_turns=turn_limit(policy))
        rollout(policy, [env])
        brought.append((iou(start, ground_truth), reached(env.episode().answer_masks, ground_truth)))
    gained = np.diff(brought, axis=1)[:, 0]
    results = {
        "mistakes": len(mistakes),
        "iou_first_click_handed_out_last": np.mean(mistakes, axis=0).round(3).tolist(),
        "undone": len(undone),
        "iou_undone_handed_out_last": np.mean(undone, axis=0).round(3).tolist() if undone else None,
        "brought": len(brought),
        "iou_brought_end": np.mean(brought, axis=0).round(3).tolist(),
        "better": round(float((gained > 0.005).mean()), 3),
        "worse": round(float((gained < -0.005).mean()), 3),
    }
    print(json.dumps({"policy": policy.name, **results}, indent=1))


if __name__ == "__main__":
    main()
