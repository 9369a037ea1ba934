"""The same stages on Ray: shards go to workers on this machine or on a cluster; the files are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ibisagent.errors import ConfigError, IbisError
from ibisagent.factory.config import Stage
from ibisagent.factory.stages import Plan, Worker


class _ShardRunner:
    """Lives in a Ray worker process; keeps segmenter and teacher loaded between shards."""

    def __init__(self, plan: Plan) -> None:
        self._worker = Worker(plan)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shards, errors = [], []
        for shard, stage in zip(batch["shard"], batch["stage"], strict=True):
            error = ""
            if not self._worker.path(stage, int(shard)).exists():  # a shard that Ray tries again may be there already
                try:
                    self._worker.run(stage, int(shard))
                except IbisError as raised:
                    error = f"{type(raised).__name__}: {raised}"
            shards.append(int(shard))
            errors.append(error)
        return {"shard": shards, "error": errors}


def on_ray(
    workers: int, address: str | None = None
) -> Callable[[Plan, Stage, Sequence[int], Callable[[int], None]], None]:
    """How `stages.build` runs shards on `workers` Ray processes with one core each.

    address: of a cluster whose machines see the data and the output folder under the same paths; None starts Ray on
    this machine. ConfigError if Ray is not installed. The stages that talk to a paid teacher stay in this process, so
    that its budget and rate are kept.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'ibisagent[ray]', or leave out --workers") from None

    def run(plan: Plan, stage: Stage, shards: Sequence[int], finished: Callable[[int], None]) -> None:
        paid = plan.config.teacher == "endpoint" and stage in ("thoughts", "reflection")
        if paid or stage == "questions":  # questions take no time worth a process
            worker = Worker(plan)
            for shard in shards:
                worker.run(stage, shard)
                finished(shard)
            return
        if not ray.is_initialized():
            local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        ray.data.DataContext.get_current().enable_progress_bars = False
        tasks = [{"shard": shard, "stage": stage} for shard in shards]
        done = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            _ShardRunner, fn_constructor_args=(plan,), concurrency=workers, batch_size=1, num_cpus=1
        )
        for row in done.iter_rows():
            if row["error"]:
                kind, _, text = row["error"].partition(": ")
                raise next((c for c in IbisError.__subclasses__() if c.__name__ == kind), IbisError)(text)
            finished(int(row["shard"]))

    return run
