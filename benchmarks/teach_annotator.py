"""What teaching saves an annotator: a stream of images of one data set, with the agent taught on the way and without.

    IBIS_DATA=DATA python benchmarks/teach_annotator.py SET -o FOLDER [--after 10,40] [--until 0.9] [--seed 0]

The annotator is simulated. The agent makes the mask of each object of an image; one of IoU >= 0.85 is accepted, another
is corrected by an expert's clicks (`imaging.clicks.next_click`, on ibis-click) up to IoU --until or 20 clicks. In
one of two arms the agent is taught after so many images, and again, on the masks as they were left, never on the ground
truth, and judged by its own check, as on the page. Both arms see the same images in the same order; images of
one patient may come before and after a teaching, as they do in a clinic's folder.

Minutes of the annotator are an estimate: LOOK_SECONDS for each mask and CLICK_SECONDS for each click. Those of the
machine are measured; of a teaching that was stopped, from its last start on. A stopped run resumes. Goal: at least 40%
fewer clicks and 30% fewer corrected images.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent import Case, Mask, Policy, Segmenter, Session, iou, load_policy, load_segmenter, read_cases, teach
from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.domain import Click
from ibisagent.files import make_folder, write_whole
from ibisagent.imaging.clicks import next_click
from ibisagent.inference.corrections import MANIFEST_NAME, add_to_data_set

GOOD, MOST_CLICKS = 0.85, 20
LOOK_SECONDS, CLICK_SECONDS = 3.0, 2.0
FEWER_CLICKS, FEWER_CORRECTED = 0.40, 0.30


def stream(data: Path, name: str, images: int, seed: int) -> list[list[CaseRow]]:
    """The rows of each image, in an order of the seed's."""
    source = read_cases(data).filter(lambda row: row.dataset == name and row.mask is not None)
    by_image: dict[Path, list[CaseRow]] = {}
    for row in source.rows:
        by_image.setdefault(row.image, []).append(row)
    order = np.random.default_rng(seed).permutation(len(by_image))
    every = list(by_image.values())
    return [every[number] for number in order[:images]]


def corrected(
    case: Case, name: str, ground_truth: Mask, agent: Policy, engine: Segmenter, until: float
) -> tuple[Mask, dict[str, Any]]:
    """The mask of one object as the annotator leaves it, and what that took. until: the IoU corrected masks get."""
    session = Session(case, engine, agent)
    began = time.monotonic()
    session.run()
    seconds = time.monotonic() - began
    made = session.masks.get(name, np.zeros(ground_truth.shape, bool))
    first = mask = made
    clicks = 0
    enough = GOOD if iou(made, ground_truth) >= GOOD else until
    while iou(mask, ground_truth) < enough and clicks < MOST_CLICKS:
        stand = [prompt for prompt in session.prompts if isinstance(prompt, Click)]
        click = next_click(ground_truth, mask, name, stand)
        if click is None:
            break
        session.click(click.x, click.y, positive=click.positive, target=name)
        clicks += 1
        mask = session.masks[name]
    facts = {"object": name, "agent_iou": float(iou(first, ground_truth)), "iou": float(iou(mask, ground_truth))}
    return mask, {**facts, "clicks": clicks, "agent_seconds": seconds}


class Arm:
    """One pass through the stream, kept in a folder."""

    def __init__(self, folder: Path, policy: str, after: Sequence[int], until: float) -> None:
        """after: how many images there are when the agent is taught, ascending. until: as in `corrected`."""
        self.folder, self.policy, self.after, self.until = folder, policy, after, until
        make_folder(folder)
        self._file = folder / "images.json"
        self.done: list[dict[str, Any]] = json.loads(self._file.read_bytes()) if self._file.exists() else []

    def run(self, images: Sequence[Sequence[CaseRow]], source: CaseSource, engine: Segmenter) -> None:
        """Go on until the end of the stream."""
        agent = load_policy(self._taught(len(self.done)))
        for number in range(len(self.done), len(images)):
            if number in self.after:
                agent = load_policy(self._taught(number))
            rows = images[number]
            masks, facts = dict[str, Mask](), []
            for row in rows:
                case = source.decode(row)
                ground_truth = (case.targets or {})[row.object]  # rows without masks were left out
                asked = Case(case.id, case.image, f"Segment the {row.object}.")
                masks[row.object], fact = corrected(asked, row.object, ground_truth, agent, engine, self.until)
                facts.append(fact)
            add_to_data_set(self.folder / "data", case.image, masks, "", case.patient)
            self.done.append({"image": rows[0].id, "objects": facts})
            write_whole(json.dumps(self.done).encode(), self._file)
            print(
                f"{self.folder.name}: {number + 1}/{len(images)}, {sum(f['clicks'] for f in facts)} clicks", flush=True
            )

    def _taught(self, number: int) -> str:
        """The agent for image `number`: that of the last teaching before it, done now if it is not there yet."""
        past = [count for count in self.after if count <= number]
        if not past:
            return self.policy
        taught_at = past[-1]
        out, data = self.folder / f"agent-{taught_at}", self.folder / f"data-{taught_at}"
        if not data.exists():  # as far as the annotator was then
            (self.folder / "data").rename(data)  # whole, and of one moment
        parts = [self.folder / f"data-{count}" / MANIFEST_NAME for count in past]
        began = time.monotonic()
        taught = teach(parts, out, policy=self.policy)
        note = self.folder / f"teaching-{taught_at}.json"
        if not note.exists():
            kept = [one.name for one in taught.objects if one.kept]
            write_whole(json.dumps({"seconds": time.monotonic() - began, "kept": kept}).encode(), note)
            print(f"{self.folder.name}: taught on {taught_at} images, kept: {', '.join(kept) or 'nothing'}", flush=True)
        return str(out)

    @property
    def result(self) -> dict[str, float]:
        """What the arm took. corrected: share of the images of which any mask needed a click."""
        objects = [one for image in self.done for one in image["objects"]]
        clicks = sum(one["clicks"] for one in objects)
        notes = [json.loads(file.read_bytes()) for file in sorted(self.folder.glob("teaching-*.json"))]
        return {
            "images": len(self.done),
            "masks": len(objects),
            "clicks_per_image": clicks / len(self.done),
            "corrected": float(np.mean([any(one["clicks"] for one in image["objects"]) for image in self.done])),
            "agent_iou": float(np.mean([one["agent_iou"] for one in objects])),
            "left_iou": float(np.mean([one["iou"] for one in objects])),
            "annotator_minutes": (LOOK_SECONDS * len(objects) + CLICK_SECONDS * clicks) / 60,
            "agent_minutes": sum(one["agent_seconds"] for one in objects) / 60,
            "teaching_minutes": sum(note["seconds"] for note in notes) / 60,
        }


def table(name: str, without: Mapping[str, float], taught: Mapping[str, float], after: Sequence[int]) -> str:
    """The two arms side by side."""
    lines = [f"| {name} | without | taught after {' and '.join(map(str, after))} |", "|---|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {without[key]:.3g} | {taught[key]:.3g} |" for key in without]
    for key, goal in (("clicks_per_image", FEWER_CLICKS), ("corrected", FEWER_CORRECTED)):
        saved = 1 - taught[key] / without[key] if without[key] else 0.0
        lines.append(f"| fewer: {key.replace('_', ' ')} (goal {goal:.0%}) | | {saved:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Both arms, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="the data set's name, as the column 'dataset' has it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--after", default="10,40", help="how many images it is taught after, with commas")
    parser.add_argument("--until", type=float, default=GOOD, help="the IoU that corrected masks are brought to")
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not os.environ.get("IBIS_DATA"):
        parser.error("set IBIS_DATA to a labelled data set")
    data = Path(os.environ["IBIS_DATA"])
    images = stream(data, arguments.set, arguments.images, arguments.seed)
    source, engine = read_cases(data), load_segmenter("ibis-click")
    folder = arguments.output / f"{arguments.set}-{arguments.seed}"
    after = sorted(map(int, arguments.after.split(",")))
    arms = [
        Arm(folder / "without", arguments.policy, (), arguments.until),
        Arm(folder / f"after-{'-'.join(map(str, after))}", arguments.policy, after, arguments.until),
    ]
    for arm in arms:
        arm.run(images, source, engine)
    shown = table(arguments.set, arms[0].result, arms[1].result, after)
    write_whole(json.dumps({arm.folder.name: arm.result for arm in arms}, indent=1).encode(), folder / "result.json")
    print(shown)


if __name__ == "__main__":
    main()
