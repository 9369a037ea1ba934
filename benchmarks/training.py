"""Speed of both fine-tuning stages: SFT examples and RL episodes a second, and where the time of RL goes.

    IBIS_DATA=DATA python benchmarks/training.py [--policy ibis-nano] [--segmenter ibis-click] [--pairs 24] [--steps 4]

Takes image-mask pairs of DATA's split "train", builds training data of them in a temporary folder, and runs `--steps`
updates of each stage with the settings of `recipes/sft-nano.toml` and `recipes/rl-nano.toml`, after one that only warms
up. Then the loop alone: 16 sampled episodes of 2 cases in one rollout against one after the other. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loop import groups_against_one_by_one, line, machine
from transformers import PrinterCallback

from ibisagent.datasets import read_cases
from ibisagent.generation.config import FactoryConfig
from ibisagent.generation.stages import Plan, build
from ibisagent.training.finetune import rl, sft
from ibisagent.training.finetune.common import without_library_warnings

RECIPES = Path(__file__).parent.parent / "recipes"
GOALS = {"share_of_rewards": ("<=", 0.02), "2_cases_speed_up_together": (">=", 4.0)}


class Clock:
    """Seconds by name, without those of timed calls inside."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose seconds are counted under `name`."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - started
                self.seconds[name] += took - self._inner.pop()
                self._inner[-1] += took

        return call


class TimedSegmenter:
    """A segmenter whose work is counted."""

    def __init__(self, segmenter: Any, clock: Clock) -> None:
        self._segmenter, self._clock = segmenter, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segmenter, name)

    def open(self, image: Any) -> Any:
        """A session whose predictions are counted."""
        session = self._clock.timed("segmenter", self._segmenter.open)(image)
        session.predict = self._clock.timed("segmenter", session.predict)
        return session


def train(trainer: Any, clock: Clock, steps: int) -> float:
    """Seconds of `steps` updates after the first one; the clock starts with them."""
    started: list[float] = []
    plain = trainer.training_step

    def step(*arguments: Any, **options: Any) -> Any:
        if not started and trainer.state.global_step >= 1:
            started.append(time.perf_counter())
            clock.seconds.clear()
        return plain(*arguments, **options)

    trainer.training_step = step
    trainer.remove_callback(PrinterCallback)
    with without_library_warnings():
        trainer.train()
    return time.perf_counter() - started[0]


def sft_speed(data: Path, out: Path, policy: str, steps: int) -> dict[str, float]:
    """Conversations a second, and the tokens of an average one."""
    recipe = sft.SftRecipe.read(RECIPES / "sft-nano.toml")
    given = {"data": data, "out": out, "policy": policy, "max_steps": steps + 1, "report_to": ()}
    recipe = recipe.model_copy(update=given)
    trainer, _ = sft.make_trainer(recipe)
    seconds = train(trainer, Clock(), steps)
    return {"sft_examples_per_second": steps * recipe.batch_size * recipe.gradient_accumulation_steps / seconds}


def rl_speed(data: Path, out: Path, policy: str, segmenter: str, steps: int) -> dict[str, float]:
    """Episodes a second, and the share of the time that each part takes."""
    recipe = rl.RlRecipe.read(RECIPES / "rl-nano.toml")
    given = {"data": data, "out": out, "policy": policy, "segmenter": segmenter, "max_steps": steps + 1}
    recipe = recipe.model_copy(update={**given, "report_to": (), "episodes_every": 0, "dynamic_sampling": 0})
    clock, load, score = Clock(), rl.load_segmenter, rl.score
    rl.load_segmenter = lambda spec, device: TimedSegmenter(load(spec, device=device), clock)  # type: ignore[assignment]
    rl.score = clock.timed("rewards", score)
    try:
        trainer, student = rl.make_trainer(recipe)
        student.model.generate = clock.timed("policy writes", student.model.generate)
        seconds = train(trainer, clock, steps)
    finally:
        rl.load_segmenter, rl.score = load, score
    shares = {f"share_of_{name.replace(' ', '_')}": spent / seconds for name, spent in clock.seconds.items()}
    shares["share_of_learning_and_the_rest"] = 1 - sum(shares.values())
    return {
        "rl_episodes_per_second": steps * recipe.batch_size * recipe.gradient_accumulation_steps / seconds,
        **shares,
    }


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with a split 'train'")
    cases = read_cases(os.environ["IBIS_DATA"], split="train").filter(lambda row: row.mask is not None)
    results: dict[str, Any] = machine() | {"policy": options.policy, "segmenter": options.segmenter}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "data"
        build(Plan(cases.spread(options.pairs), made, FactoryConfig(segmenter=options.segmenter)))
        results |= sft_speed(made, Path(folder) / "sft", options.policy, options.steps)
        results |= rl_speed(made, Path(folder) / "rl", options.policy, options.segmenter, options.steps)
    results |= groups_against_one_by_one(cases, options.policy, options.segmenter)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(*(line(name, value, GOALS) for name, value in results.items()), sep="\n")


if __name__ == "__main__":
    main()
