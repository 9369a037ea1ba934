"""The same stages on Ray: shards go to workers on this machine or on a cluster; the files are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import one_line
from ibisagent.generation.config import Stage
from ibisagent.generation.stages import Plan, Worker

LIVES = 3  # how often a worker that the machine killed is started again


class _ShardRunner:
    """Lives in a Ray worker process; keeps segmenter and teacher loaded between shards and stages."""

    _worker: Worker | None = None

    def run(self, plan: Plan, stage: Stage, shard: int) -> tuple[int, str, str]:
        """Do a shard; (its number, class and text of an IbisError that stopped it, or twice "")."""
        self._worker = self._worker or Worker(plan)
        if not self._worker.path(stage, shard).exists():  # a shard that Ray tries again may be there already
            try:
                self._worker.run(stage, shard)
            except IbisError as error:
                return shard, type(error).__name__, str(error)
        return shard, "", ""


def on_ray(
    workers: int, address: str | None = None
) -> Callable[[Plan, Stage, Sequence[int], Callable[[int], None]], None]:
    """How `stages.build` runs shards on `workers` Ray processes with one core each, which live through all stages.

    address: of a cluster whose machines see the data and the output folder under the same paths; None starts Ray on
    this machine. ConfigError if Ray is not installed. The stages that talk to a paid teacher stay in this process, so
    that its budget and rate are kept.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'ibisagent[ray]', or leave out --workers") from None

    pool: Any = None

    def start() -> Any:
        if not ray.is_initialized():
            local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        runner: Any = ray.remote(num_cpus=1, max_restarts=LIVES, max_task_retries=LIVES)(_ShardRunner)
        return ActorPool([runner.remote() for _ in range(workers)])

    def run(plan: Plan, stage: Stage, shards: Sequence[int], finished: Callable[[int], None]) -> None:
        nonlocal pool
        paid = plan.config.teacher == "endpoint" and stage in ("thoughts", "reflection")
        if paid or stage == "questions":  # questions take no time worth a process
            worker = Worker(plan)
            for shard in shards:
                worker.run(stage, shard)
                finished(shard)
            return
        pool, shared = pool or start(), ray.put(plan)
        try:
            done = pool.map_unordered(lambda runner, shard: runner.run.remote(shared, stage, shard), shards)
            for shard, kind, text in done:
                if kind:
                    raise next((c for c in IbisError.__subclasses__() if c.__name__ == kind), IbisError)(text)
                finished(shard)
        except ray.exceptions.RayActorError as error:
            raise IbisError(
                f"a Ray worker died {LIVES + 1} times at stage {stage} ({one_line(error)});"
                " give it more memory and start the same command again: it resumes"
            ) from error

    return run
