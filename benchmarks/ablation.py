"""The paper's two ablations at the scale of ibis-nano: what each stage of training adds, what each reward term does.

    IBIS_DATA=DATA python benchmarks/ablation.py RUNS [--seeds 3] [--only "SFT + RL" ...] [--policy ibis-nano]

One command from image-mask pairs to the two tables in RUNS/ablation.md. Every row is a chain of stages that starts from
`--policy`: `ibisagent sft` and `ibisagent rl` with the recipes of recipes/, shortened by the options below, then
`ibisagent evaluate` on split "val" of DATA. Rows share the stages that they have in common. What is finished is not
done again, a stage that was stopped goes on from its checkpoint. The rows of the training-strategy table are run with
every seed, those of the reward table with seed 0. Two starts with different `--only` may work side by side in RUNS once
the stages that they share are finished; the tables hold all rows that are evaluated by then.

Training sees split "train" of licence class "ok" without the patients held out for choosing settings; "val" is only
ever evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.environment import package_version
from ibisagent.evaluation import runs
from ibisagent.evaluation.results import Evaluation, compare, summarise
from ibisagent.factory.config import FactoryConfig
from ibisagent.factory.stages import Plan, build
from ibisagent.images import write_whole
from ibisagent.rewards import PAPER_TERMS
from ibisagent.training import rl, sft
from ibisagent.training.click_states import is_development

RECIPES = Path(__file__).parent.parent / "recipes"
REFLECTION = ("correction", "inconsistency")
SHOWN = {
    "iou": "IoU",
    "dice": "Dice",
    "first_hit": "first action hits",
    "turns": "turns",
    "raising_corrections": "corrections that raise",
    "stop_gap": "stop gap",
}


@dataclass(frozen=True)
class Row:
    """A row of a table. stages: of SFT "sft" or "sft-plain" (without self-reflection), of RL "rl" or "rl-TERM-TERM".

    paper: what the paper reports: IoU in %, and mean turns where it does.
    """

    name: str
    stages: tuple[str, ...]
    paper: str
    seeds: bool = False


STRATEGIES = (
    Row("prompt only", (), "11.77"),
    Row("SFT", ("sft-plain",), "53.42", True),
    Row("SFT + reflection", ("sft",), "57.16", True),
    Row("RL only", ("rl",), "62.77", True),
    Row("SFT + RL", ("sft-plain", "rl"), "68.92", True),
    Row("SFT + reflection + RL", ("sft", "rl"), "72.09", True),
)
REWARDS = (
    Row("answer + format", ("sft", "rl-answer-format"), "73.77, 11.29 turns"),
    Row("+ click", ("sft", "rl-answer-format-click"), "76.60, 10.61"),
    Row("+ progress", ("sft", "rl-answer-format-progress"), "77.64, 8.59"),
    Row("+ length", ("sft", "rl-answer-format-length"), "74.19, 5.94"),
    Row("+ click + progress", ("sft", "rl-answer-format-click-progress"), "80.61, 8.12"),
    Row("+ click + length", ("sft", "rl-answer-format-click-length"), "77.73, 5.03"),
    Row("+ progress + length", ("sft", "rl-answer-format-progress-length"), "79.37, 4.26"),
    Row("all five", ("sft", "rl"), "80.63, 3.67"),
)


@dataclass(frozen=True)
class Ablation:
    """Where everything lies, and how long the stages are."""

    data: Path
    out: Path
    policy: str
    segmenter: str
    pairs: int | None
    sft_steps: int
    rl_steps: int
    turns: int
    lessons: Path

    def build(self) -> None:
        """Make the training data, or what is missing of them."""
        licensed = read_cases(self.data, split="train", licence_classes={"ok"})
        cases: CaseSource = licensed.filter(lambda row: row.mask is not None and not is_development(row.patient))
        if self.pairs is not None:
            cases = cases.spread(self.pairs)
        build(Plan(cases, self.lessons, FactoryConfig(segmenter=self.segmenter)))

    def folder(self, stages: tuple[str, ...], seed: int) -> Path:
        """Of the last of `stages`."""
        return self.out / f"seed-{seed}" / "+".join(stages or ("start",))

    def trained(self, stages: tuple[str, ...], seed: int) -> str:
        """The policy after `stages`, as `load_policy` takes it; trained as far as it is not."""
        if not stages:
            return self.policy
        out = self.folder(stages, seed)
        if not (out / "policy").is_dir():
            start = self.trained(stages[:-1], seed).removeprefix("mllm:")
            print(f"training {out.name}, seed {seed}", flush=True)
            changes = [f"data={self.lessons}", f"out={out}", f"policy={start}", f"seed={seed}"]
            kind, *terms = stages[-1].split("-")
            if kind == "sft":
                left_out = list(REFLECTION) if terms == ["plain"] else []
                changes += [f"steps={self.sft_steps}", f"leave_out={json.dumps(left_out)}"]
                sft.train(sft.SftRecipe.read(RECIPES / "sft-nano.toml", changes))
            else:
                changes += [f"steps={self.rl_steps}", f"segmenter={self.segmenter}"]
                changes += [f"rewards.{term}=0" for term in PAPER_TERMS if terms and term not in terms]
                rl.train(rl.RlRecipe.read(RECIPES / "rl-nano.toml", changes))
        return f"mllm:{out / 'policy'}"

    def evaluated(self, stages: tuple[str, ...], seed: int) -> Evaluation:
        """The judged policy after `stages`."""
        policy = self.trained(stages, seed)
        setup = runs.Setup(
            self.data, "val", policy=policy, segmenter=self.segmenter, max_turns=self.turns, baselines=False
        )
        return runs.run(setup, self.folder(stages, seed) / "evaluation")

    def finished(self, stages: tuple[str, ...], seed: int) -> Evaluation | None:
        """The judged policy after `stages`, if that has been done."""
        folder = self.folder(stages, seed) / "evaluation"
        return runs.Run(folder).evaluation if (folder / runs.RESULT_NAME).is_file() else None


def tables(ablation: Ablation, seeds: int) -> str:
    """Both tables, of what is finished."""
    parts = [
        f"policy {ablation.policy}, segmenter {ablation.segmenter}, {ablation.sft_steps} updates of SFT,"
        f" {ablation.rl_steps} of RL, at most {ablation.turns} turns, ibisagent {package_version()}",
        "## Training strategy",
        *_table(ablation, STRATEGIES, seeds),
        "## Rewards",
        *_table(ablation, REWARDS, 1),
        "## Step by step",
        "Mean IoU of the second less that of the first, the same cases, 95% interval over patients, seed by seed.",
        *_steps(ablation, seeds),
    ]
    return "\n".join(parts) + "\n"


def _table(ablation: Ablation, rows: tuple[Row, ...], seeds: int) -> Iterator[str]:
    yield "| | paper: IoU | seeds | " + " | ".join(SHOWN.values()) + " |"
    yield "|---" * (len(SHOWN) + 3) + "|"
    for row in rows:
        found = [one for seed in range(seeds) if (one := ablation.finished(row.stages, seed))]
        if not found:
            continue
        summaries = [summarise(one.results) for one in found]
        cells = []
        for name in SHOWN:
            values = [summary.means.get(name, float("nan")) for summary in summaries]
            cell = f"{np.mean(values):.3f}"
            interval = summaries[0].intervals.get(name)
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):.3f}"
            elif name == "iou" and interval is not None:
                cell += f" ({interval[0]:.3f} to {interval[1]:.3f})"
            cells.append(cell)
        yield f"| {row.name} | {row.paper} | {len(found)} | " + " | ".join(cells) + " |"


def _steps(ablation: Ablation, seeds: int) -> Iterator[str]:
    yield ""
    pairs = [(0, 1), (1, 2), (0, 3), (1, 4), (2, 5), (4, 5)]
    for lower, upper in ((STRATEGIES[a], STRATEGIES[b]) for a, b in pairs):
        for seed in range(seeds):
            judged = [ablation.finished(row.stages, seed) for row in (lower, upper)]
            if judged[0] is None or judged[1] is None:
                continue
            found = compare(judged[0], judged[1]).figures
            iou, turns = found["iou"], found["turns"]
            spread = "" if iou.interval is None else f" ({iou.interval[0]:+.3f} to {iou.interval[1]:+.3f})"
            yield (
                f"- {lower.name} -> {upper.name}, seed {seed}: IoU {iou.difference:+.3f}{spread}, p {iou.p:.3f};"
                f" turns {turns.a:.2f} -> {turns.b:.2f}"
            )


def main() -> None:
    """Run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="RUNS")
    parser.add_argument("--policy", default="ibis-nano", help="what every chain starts from")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--seeds", type=int, default=3, help="of the training-strategy table")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="only these rows, by name")
    parser.add_argument("--lessons", type=Path, help="folder of `build-data`; default: it is made in RUNS")
    parser.add_argument("--pairs", type=int, help="image-mask pairs to make it of; default: all")
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--rl-steps", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5, help="most turns of an episode in the evaluation")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with splits 'train' and 'val'")
    rows = [row for row in STRATEGIES + REWARDS if not options.only or row.name in options.only]
    if unknown := set(options.only) - {row.name for row in rows}:
        parser.error(f"no row '{unknown.pop()}'; there are: {', '.join(row.name for row in STRATEGIES + REWARDS)}")
    ablation = Ablation(
        Path(os.environ["IBIS_DATA"]),
        options.out,
        options.policy,
        options.segmenter,
        options.pairs,
        options.sft_steps,
        options.rl_steps,
        options.turns,
        options.lessons or options.out / "data",
    )
    if options.lessons is None:
        ablation.build()
    for seed in range(options.seeds):
        for row in rows:
            if seed == 0 or row.seeds:
                evaluation = ablation.evaluated(row.stages, seed)
                means = summarise(evaluation.results).means
                print(
                    json.dumps({"row": row.name, "seed": seed, **{name: means.get(name) for name in SHOWN}}), flush=True
                )
                write_whole(tables(ablation, options.seeds).encode(), options.out / "ablation.md")


if __name__ == "__main__":
    main()
