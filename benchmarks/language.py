"""Does the policy mind what it is asked? Presence F1, refusals by kind, and phrasings that were never trained on.

    IBIS_DATA=DATA python benchmarks/language.py [--policy ibis-nano] [--segmenter ibis-click] [--seed 0] [--limit N]

On split "val". Presence: every pair is asked after its object ("Is there a ...? If so, segment it.", phrasings kept for
evaluation) and after one that its image does not show: near misses (other objects of the data set) and far ones
(of other parts of the body) in turn, where `teacher.phrasings.Absences` knows any. One reply each; F1 of "it is there".
Phrasings: every pair is asked with one that was trained on and one that was not, whole episodes, the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

import numpy as np

from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.evaluation import evaluate
from ibisagent.evaluation.results import compare, summarise
from ibisagent.generation.teacher.phrasings import Absences, phrasings, with_article
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter


class Questions:
    """Draws questions about rows."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def pick(self, names: list[str]) -> str:
        """One of them."""
        return names[int(self._random.integers(len(names)))]

    def ask(self, row: CaseRow, kind: str, name: str, *, held_out: bool) -> CaseRow:
        """`row` with a question of `kind` after `name`."""
        text = self.pick([text for _, text in phrasings(kind, held_out=held_out)])
        return replace(row, query=text.format(name=name, a_name=with_article(name), modality=row.modality or "medical"))


def presence_rows(data: CaseSource, rows: list[CaseRow], questions: Questions) -> tuple[list[CaseRow], dict[str, str]]:
    """The questions, and the kind of each by its id: "present", "near" or "far"."""
    absences = Absences(data.rows)
    shown: dict[str, list[str]] = {}
    for row in data.rows:
        shown.setdefault(str(row.image), []).append(row.object)
    asked, kinds = [], {}
    for number, row in enumerate(rows):
        asked.append(questions.ask(row, "existence", row.object, held_out=True))
        kinds[row.id] = "present"
        here = shown[str(row.image)]
        choices = {"near": absences.near(row, here), "far": absences.far(row, here)}
        wanted = ["near", "far"] if number % 2 == 0 else ["far", "near"]
        kind = next((kind for kind in wanted if choices[kind]), None)
        if kind is not None:
            name = questions.pick(choices[kind])
            absent = replace(row, id=f"{row.id} without {name}", object=name, mask=None)
            asked.append(questions.ask(absent, "existence", name, held_out=True))
            kinds[absent.id] = kind
    return asked, kinds


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None, help="only so many pairs, spread over the data")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with a split 'val'")
    data = read_cases(os.environ["IBIS_DATA"])
    pairs = data.filter(lambda row: row.split == "val" and row.mask is not None)
    rows = list((pairs if options.limit is None else pairs.spread(options.limit)).rows)
    policy, segmenter = load_policy(options.policy), load_segmenter(options.segmenter)
    questions = Questions(options.seed)

    asked, kinds = presence_rows(data, rows, questions)
    found = evaluate(CaseSource(asked, data.where), policy, segmenter, oracle=False, max_turns=1)
    results = {"policy": policy.name, "presence_f1": summarise(found.results).means["presence_f1"]}
    for kind in ("present", "near", "far"):
        said = [one.overlap.mask == 0 for one in found.results if kinds[one.case_id] == kind and one.overlap]
        results |= {f"{kind}": len(said), f"refused_{kind}": float(np.mean(said))}

    runs = [
        evaluate(
            CaseSource([questions.ask(row, "referring", row.object, held_out=held_out) for row in rows], data.where),
            policy,
            segmenter,
            oracle=False,
        )
        for held_out in (False, True)
    ]
    iou = compare(*runs).metrics["iou"]
    results |= {"iou_trained_phrasings": iou.a, "iou_other_phrasings": iou.b, "iou_difference": iou.difference}
    print(json.dumps({**results, "iou_difference_95": iou.interval}, indent=1))


if __name__ == "__main__":
    main()
