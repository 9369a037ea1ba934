"""The paper's two ablations at the scale of ibis-nano: what each stage of training adds, what each reward term does.

    IBIS_DATA=DATA python benchmarks/ablation.py RUNS --policy runs/ibis-nano/ibis-nano [--seeds 3] [--only "SFT + RL"]

One command from image-mask pairs to the two tables in RUNS/ablation.md. No pretrained language model is behind
ibis-nano: the paper's "prompt only" is a model with random weights, and its cold start is `ibisagent train nano`, the
imitation of an expert's single turns, whose result is `--policy`. Every row is a chain of stages from there:
`ibisagent train sft` (whole episodes with the factory's thoughts, with self-reflection or without) and
`ibisagent train rl`, with the recipes of recipes/, shortened by the options below; then `ibisagent eval run` on split
"val" of DATA. Rows share the stages that they have in common. What is finished is not done again, a stage that was
stopped resumes from its
checkpoint. Rows of the training-strategy table that draw anything are run with every seed, the others with seed 0.
Multiple starts with different `--only` may work side by side in RUNS if they share no unfinished stage; the tables hold
all rows that are evaluated by then.

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
import torch

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.environment import package_version
from ibisagent.evaluation import runs
from ibisagent.evaluation.results import Evaluation, compare, summarise
from ibisagent.files import write_whole
from ibisagent.generation.config import FactoryConfig
from ibisagent.generation.stages import Plan, build
from ibisagent.rewards import PAPER_TERMS
from ibisagent.training.click.states import is_development
from ibisagent.training.finetune import rl, sft
from ibisagent.training.nano import trainer as nano

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
    """A row of a table. stages: "random" (fresh weights instead of the start), of SFT "sft" or "sft-plain" (without
    self-reflection), of RL "rl" or "rl-TERM-TERM" (these reward terms only).

    paper: what the paper reports: IoU in %, and mean turns where it does.
    """

    name: str
    stages: tuple[str, ...]
    paper: str
    seeds: bool = False


STRATEGIES = (
    Row("prompt only", ("random",), "11.77"),
    Row("SFT", (), "53.42"),
    Row("SFT + whole episodes", ("sft-plain",), "", True),
    Row("SFT + whole episodes + reflection", ("sft",), "57.16", True),
    Row("RL only", ("random", "rl"), "62.77"),
    Row("SFT + RL", ("rl",), "68.92", True),
    Row("all", ("sft", "rl"), "72.09", True),
)
REWARDS = (
    Row("answer + format", ("rl-answer-format",), "73.77, 11.29 turns"),
    Row("+ click", ("rl-answer-format-click",), "76.60, 10.61"),
    Row("+ progress", ("rl-answer-format-progress",), "77.64, 8.59"),
    Row("+ length", ("rl-answer-format-length",), "74.19, 5.94"),
    Row("+ click + progress", ("rl-answer-format-click-progress",), "80.61, 8.12"),
    Row("+ click + length", ("rl-answer-format-click-length",), "77.73, 5.03"),
    Row("+ progress + length", ("rl-answer-format-progress-length",), "79.37, 4.26"),
    Row("all five (SFT + RL above)", ("rl",), "80.63, 3.67"),
)
STEPS = (
    ("prompt only", "SFT"),
    ("SFT", "SFT + whole episodes"),
    ("SFT + whole episodes", "SFT + whole episodes + reflection"),
    ("SFT", "SFT + RL"),
    ("SFT + whole episodes + reflection", "all"),
    ("SFT + RL", "all"),
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
    examples: Path

    def build(self) -> None:
        """Make the training data, or what is missing of them."""
        licensed = read_cases(self.data, split="train", licence_classes={"ok"})
        cases: CaseSource = licensed.filter(lambda row: row.mask is not None and not is_development(row.patient))
        if self.pairs is not None:
            cases = cases.spread(self.pairs)
        build(Plan(cases, self.examples, FactoryConfig(segmenter=self.segmenter)))

    def folder(self, stages: tuple[str, ...], seed: int) -> Path:
        """Of the last of `stages`."""
        return self.out / f"seed-{seed}" / "+".join(stages or ("start",))

    def trained(self, stages: tuple[str, ...], seed: int) -> str:
        """The policy after `stages`, as `load_policy` takes it; trained as far as it is not."""
        if not stages:
            return self.policy
        out = self.folder(stages, seed)
        if stages == ("random",):
            return self._untrained(out / "policy", seed)
        if not (out / "policy").is_dir():
            start = self.trained(stages[:-1], seed).removeprefix("mllm:")
            print(f"training {out.name}, seed {seed}", flush=True)
            changes = [f"data={self.examples}", f"out={out}", f"policy={start}", f"seed={seed}"]
            kind, *terms = stages[-1].split("-")
            if kind == "sft":
                recipe = sft.SftRecipe.read(RECIPES / "sft-nano.toml", [*changes, f"max_steps={self.sft_steps}"])
                left_out = (*recipe.leave_out, *(REFLECTION if terms == ["plain"] else ()))
                sft.train(recipe.model_copy(update={"leave_out": left_out}))
            else:
                changes += [f"max_steps={self.rl_steps}", f"segmenter={self.segmenter}"]
                changes += [f"rewards.{term}={int(not terms or term in terms)}" for term in PAPER_TERMS]
                rl.train(rl.RlRecipe.read(RECIPES / "rl-nano.toml", changes))
        return f"mllm:{out / 'policy'}"

    def _untrained(self, folder: Path, seed: int) -> str:
        if not folder.is_dir():
            torch.manual_seed(seed)
            processor, _ = nano.load(Path(self.policy))
            fresh = folder.with_name("part")
            nano.save(nano.build_model(processor), processor, fresh)
            fresh.rename(folder)
        return f"mllm:{folder}"

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
        "\n## Training strategy\n",
        *_table(ablation, STRATEGIES, seeds),
        "\n## Rewards\n",
        *_table(ablation, REWARDS, 1),
        "\n## Step by step\n",
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
            values = [summary.means[name] for summary in summaries if name in summary.means]
            cell = f"{np.mean(values):.3f}" if values else ""
            interval = summaries[0].intervals.get(name)
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):.3f}"
            elif name == "iou" and interval is not None:
                cell += f" ({interval[0]:.3f} to {interval[1]:.3f})"
            cells.append(cell)
        yield f"| {row.name} | {row.paper} | {len(found)} | " + " | ".join(cells) + " |"


def _steps(ablation: Ablation, seeds: int) -> Iterator[str]:
    yield ""
    rows = {row.name: row for row in STRATEGIES}
    for lower, upper in ((rows[a], rows[b]) for a, b in STEPS):
        for seed in range(seeds):
            before, after = (ablation.finished(row.stages, seed if row.seeds else 0) for row in (lower, upper))
            if before is None or after is None or (seed and not upper.seeds):
                continue
            found = compare(before, after).metrics
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
    parser.add_argument("--policy", required=True, help="the start: folder of `ibisagent train nano`")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--seeds", type=int, default=3, help="of the training-strategy table")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="only these rows, by name")
    parser.add_argument("--examples", type=Path, help="folder of `ibisagent data build`; default: it is made in RUNS")
    parser.add_argument("--pairs", type=int, help="image-mask pairs to make it of; default: all")
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--rl-steps", type=int, default=40)
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
        options.out.resolve(),  # a policy's path is part of what an evaluation remembers
        options.policy,
        options.segmenter,
        options.pairs,
        options.sft_steps,
        options.rl_steps,
        options.turns,
        options.examples or options.out / "data",
    )
    if options.examples is None:
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
