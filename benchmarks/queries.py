"""Forty queries about four images: what is answered, and whether any answer names an object that was not asked for.

    IBIS_DATA=DATA python benchmarks/queries.py [--policy ibis-nano] [--segmenter ibis-click]

Prints a Markdown table. The images are the first rows of split "train" that show the objects of `IMAGES`. The exit code
is 1 where an answer, an absent object or a mask is called by a known name that the query does not mean.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Case
from ibisagent.errors import ConfigError
from ibisagent.inference.image import asked_objects, run_case
from ibisagent.policies import Policy, load_policy
from ibisagent.segmenters import Segmenter, load_segmenter

IMAGES = {
    "fundus": ("optic disc", "fundus"),
    "chest X-ray": ("left lung", "X-Ray"),
    "heart MRI": ("left ventricle", "MRI"),
    "abdominal CT": ("liver", "CT"),
}
"""Shown name of an image: an object and the modality of it."""

QUERIES: tuple[tuple[str, str, str], ...] = (
    ("plain", "fundus", "Segment the optic disc."),
    ("capitals", "fundus", "OPTIC DISC"),
    ("capitals", "fundus", "SEGMENT THE OPTIC DISC!"),
    ("synonym", "fundus", "optic nerve head"),
    ("synonym", "fundus", "Outline the papilla, please."),
    ("abbreviation", "heart MRI", "LV"),
    ("abbreviation", "heart MRI", "I need the mask of the LV."),
    ("synonym", "heart MRI", "heart muscle"),
    ("Latin", "abdominal CT", "hepar"),
    ("Latin", "abdominal CT", "lien"),
    ("Latin", "chest X-ray", "pulmo sinister"),
    ("side", "chest X-ray", "Lt lung"),
    ("side", "chest X-ray", "lung (right)"),
    ("side never learned", "abdominal CT", "left kidney"),
    ("plural", "chest X-ray", "Segment both lungs."),
    ("plural", "fundus", "retinal vessels"),
    ("British spelling", "abdominal CT", "liver tumour"),
    ("typo", "fundus", "Segment the optc disc."),
    ("typo", "abdominal CT", "livr"),
    ("typo", "chest X-ray", "left lnug"),
    ("multiple", "fundus", "Segment the optic disc and the optic cup."),
    ("multiple", "abdominal CT", "liver, spleen and aorta"),
    ("multiple", "chest X-ray", "left and right lung"),
    ("everything", "fundus", "segment everything"),
    ("own 'and'", "abdominal CT", "abdominal aorta and iliac artery"),
    ("one or two?", "abdominal CT", "breast and ovarian cancer"),
    ("not possible", "fundus", "Segment the liver."),
    ("not possible", "fundus", "Is there a left lung in this image?"),
    ("not possible", "chest X-ray", "optic disc"),
    ("not possible", "heart MRI", "polyp"),
    ("not possible", "abdominal CT", "Check for a mitochondrion. If so, segment it."),
    ("never learned", "fundus", "fovea"),
    ("never learned", "abdominal CT", "Segment the gallbladder."),
    ("German", "abdominal CT", "Wo ist die Leber?"),
    ("French", "abdominal CT", "Montrez-moi le foie, s'il vous plaît"),
    ("Spanish", "abdominal CT", "¿Dónde está el hígado?"),
    ("question", "chest X-ray", "Where is the left lung?"),
    ("question", "fundus", "Is there an optic disc in this image? If so, segment it."),
    ("no letters", "fundus", "?"),
    ("very long", "fundus", "Segment the optic disc. " * 80),
)
"""(kind, image, query)."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one query. wrong: known names in it that the query does not mean."""

    kind: str
    image: str
    query: str
    outcome: str
    said: str
    wrong: tuple[str, ...]


def ask(kind: str, shown: str, case: Case, query: str, policy: Policy, segmenter: Segmenter) -> Row:
    """Ask, and look for names that were not asked for."""
    try:
        episode = run_case(Case(case.id, case.image, query), policy, segmenter)
    except ConfigError as error:
        return Row(kind, shown, query, "refused", str(error), ())
    objects = asked_objects(episode)
    outcome = "; ".join(
        f"{name}: {f'{mask.mean():.1%} of the image' if mask.any() else 'absent'}"
        for name, mask in episode.answer_masks.items()
    )
    facts = "; ".join(
        f"{one['name']}: {'known' if one['known'] else 'not known'}"
        + (f", nearest {one['nearest']}" if one["nearest"] else "")
        + f", presence {one['presence']:.2f}"
        for one in objects
    )
    told = " ".join([episode.answer.answer, *episode.answer.absent, *episode.answer_masks]).lower()
    told += " ".join(turn.reply.thought for turn in episode.turns).lower()
    for own in sorted((one["name"].lower() for one in objects), key=len, reverse=True):
        told = told.replace(own, "")
    vocabulary = getattr(policy, "vocabulary", None)
    wrong = tuple(name for name in (vocabulary.learned if vocabulary else ()) if name.lower() in told)
    return Row(kind, shown, query, outcome or "no mask", facts, wrong)


def image_of(data: CaseSource, thing: str, modality: str) -> Case:
    """The first training image with such an object."""
    row = next(row for row in data.rows if (row.split, row.object, row.modality) == ("train", thing, modality))
    return data.decode(row)


def main() -> int:
    """Print the table; 1 where a name is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    options = parser.parse_args()
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set")
    data = read_cases(os.environ["IBIS_DATA"])
    cases = {shown: image_of(data, *wanted) for shown, wanted in IMAGES.items()}
    policy, segmenter = load_policy(options.policy), load_segmenter(options.segmenter)
    print("| kind | image | query | outcome | what the result says |\n| --- | --- | --- | --- | --- |")
    wrong = 0
    for kind, shown, query in QUERIES:
        row = ask(kind, shown, cases[shown], query, policy, segmenter)
        asked = row.query if len(row.query) < 80 else f"{row.query[:48]}... ({len(row.query)} characters)"
        said = row.said + (f" **wrong: {', '.join(row.wrong)}**" if row.wrong else "")
        print(f"| {row.kind} | {row.image} | `{asked}` | {row.outcome} | {said} |", flush=True)
        wrong += bool(row.wrong)
    print(f"\n{len(QUERIES)} queries; answers that name an object that was not asked for: {wrong}.")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
