"""MONAI Label's endpoints about learning: which image to label next, training, and the server's log."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import APIRouter, Body, HTTPException, Query, Response

from ibisagent.domain import Image
from ibisagent.errors import ConfigError
from ibisagent.evaluation.reliability import expected_iou_of
from ibisagent.evaluation.selection import Candidate, choose, features_of
from ibisagent.server.app import AgentThreads
from ibisagent.server.monai_store import ImageStore, Stored, volume_ending
from ibisagent.server.service import MissingError, Service, Teaching
from ibisagent.volumes.dicomweb import Series

NEXT, RANDOM, DOUBTFUL, USEFUL = "next", "random", "doubtful", "useful"
STRATEGIES = {
    NEXT: "the image without a label that was longest not given out",
    RANDOM: "any image without a label",
    DOUBTFUL: "the image without a label of which the agent is least sure; scans come after them",
    USEFUL: "the image without a label that teaches most: the agent is in doubt, and it is unlike those with a label",
}
SCORED_AT_ONCE = 8  # images that the agent looks at for one request
LOG_LINES = 1000


class RecentLines(logging.Handler):
    """The last lines of a log, in memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.lines: deque[str] = deque(maxlen=LOG_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """As logging has it."""
        self.lines.extend(self.format(record).splitlines())


def add_learning(
    router: APIRouter,
    service: Service,
    threads: AgentThreads,
    images: ImageStore,
    unlabelled_series: Callable[[], list[Series]],
    query: str,
) -> Callable[[], Any]:
    """Add the endpoints; what is returned runs with the application. query: what doubt is about."""
    offers = _Offers(service, images, unlabelled_series, query)

    @router.post("/activelearning/{strategy}")
    async def sample(strategy: str, _params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The image to label next; an empty object where every image has a label."""
        if strategy not in STRATEGIES:
            raise MissingError(f"no strategy '{strategy[:40]}' here: ask for one of {', '.join(STRATEGIES)}")
        return await threads(lambda: offers.next(strategy))

    _add_training(router, service)
    return _add_log(router)


class _Offers:
    def __init__(
        self, service: Service, images: ImageStore, unlabelled_series: Callable[[], list[Series]], query: str
    ) -> None:
        self._service, self._images, self._series, self._query = service, images, unlabelled_series, query
        self._given: dict[str, float] = {}  # series that are not here yet: when they were last given out
        self._eye = service.policy.inner  # by whose features images are compared, whatever is taught meanwhile
        self._features: dict[str, np.ndarray] = {}

    def next(self, strategy: str) -> dict[str, Any]:
        """What clients are told of the image to label next."""
        kept = [stored for stored in self._images.all if not stored.labels]
        series = {one.uid: one for one in self._series()}
        last = {one.id: max(one.offered, self._given.get(one.id, 0.0)) for one in kept}
        last |= {uid: self._given.get(uid, 0.0) for uid in series if uid not in last}
        if not last:
            return {}
        if strategy == RANDOM:
            chosen = random.choice(list(last))
        elif strategy == NEXT:
            chosen = min(last, key=last.__getitem__)
        else:
            scores = {one.id: one.reliability for one in self._scored(kept) if one.reliability is not None}
            useful = self._most_useful(scores) if strategy == USEFUL else None
            chosen = useful or min(last, key=lambda id_: (scores.get(id_, 2.0), last[id_]))
        self._given[chosen] = time.time()
        told: dict[str, Any] = {"id": chosen, "name": chosen}
        if chosen in series:
            told |= {"StudyInstanceUID": series[chosen].study, "SeriesInstanceUID": chosen}
        for stored in kept:
            if stored.id == chosen:
                stored.offered = self._given[chosen]
                self._images.keep(stored)
                told |= {"name": stored.name, "ts": int(stored.created), "reliability": stored.reliability}
        return told

    def _most_useful(self, scores: Mapping[str, float]) -> str | None:
        """The one to label next of those with a score; None where there is none."""
        labelled = [one for one in self._images.all if one.labels and _is_image(one)]
        for stored in [one for one in labelled if one.id not in self._features][:SCORED_AT_ONCE]:
            self._look(stored)
        seen = [self._features[one.id] for one in labelled if one.id in self._features]
        candidates = [Candidate(id_, score, self._features[id_]) for id_, score in scores.items()]
        return next((one.name for one in choose(candidates, 1, seen)), None)

    def _scored(self, kept: Sequence[Stored]) -> Sequence[Stored]:
        """The same; some of the images among them that this policy had not looked at have a score now, and all that
        have one have features."""
        images = [one for one in kept if _is_image(one)]
        policy = self._service.policy.name
        unseen = [one for one in images if one.reliability is None or one.judged_by != policy]
        for stored in unseen[:SCORED_AT_ONCE]:
            image = self._look(stored)
            session = self._service.segment(image, self._query)
            [episode] = session.episodes()
            score = expected_iou_of(episode, image, self._query, session.policy, self._service.segmenter)
            stored.reliability = round(score, 4)
            stored.judged_by = policy
            self._images.keep(stored)
        for stored in images:
            if stored.reliability is not None and stored.id not in self._features:
                self._look(stored)
        return kept

    def _look(self, stored: Stored) -> Image:
        """The image, whose features are known then."""
        image = self._service.read_upload(stored.path.read_bytes(), stored.file)
        self._features[stored.id] = features_of(self._eye, image)
        return image


def _is_image(stored: Stored) -> bool:
    return not volume_ending(stored.file) and not stored.path.is_dir()


def _add_training(router: APIRouter, service: Service) -> None:
    def teaching() -> Teaching:
        if service.teaching is None:
            raise ConfigError("teaching is not available here: train with 'ibisagent teach'")
        return service.teaching

    @router.get("/train/")
    def status(check_if_running: bool = False) -> dict[str, Any]:
        """How far the training is; 404 where none was begun, or none is under way and that is what was asked."""
        found = None if service.teaching is None else service.teaching.status()
        if found is None or (check_if_running and found["status"] != "RUNNING"):
            raise HTTPException(404, "no training was begun" if found is None else "no training is under way")
        return found

    def start(settings: dict[str, Any] | None = Body(None)) -> dict[str, Any]:  # noqa: B008 - FastAPI's way
        """Begin to teach the models what users corrected."""
        return teaching().start(settings or {})

    router.post("/train/")(start)

    @router.post("/train/{model}")
    def start_model(model: str, settings: dict[str, Any] | None = Body(None)) -> dict[str, Any]:  # noqa: B008
        """The same; there is one model to teach, whatever it is called."""
        return start({**(settings or {}), "model": model})

    @router.delete("/train/")
    def stop() -> dict[str, Any]:
        """End the training."""
        return teaching().stop()


def _add_log(router: APIRouter) -> Callable[[], Any]:
    recent = RecentLines()

    @router.get("/logs/", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def logs(lines: int = Query(300, ge=1, le=LOG_LINES)) -> Response:
        """The last lines of the server's log. It names neither images nor users."""
        return Response("".join(f"{line}\n" for line in list(recent.lines)[-lines:]), media_type="text/plain")

    @asynccontextmanager
    async def listening() -> AsyncIterator[None]:
        log = logging.getLogger("ibisagent.server")
        before = log.level, log.propagate
        log.setLevel(logging.INFO)
        log.propagate = False  # these lines are for /logs, not for the terminal
        log.addHandler(recent)
        log.info("the server has started")
        try:
            yield
        finally:
            log.removeHandler(recent)
            log.level, log.propagate = before

    return listening
