"""HTTP for the teacher: begin, look, stop, and go back to the policy as it came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ibisagent.policies import Policy, load_policy
from ibisagent.server.app import AgentThreads
from ibisagent.server.labelled import LabelledImages
from ibisagent.server.service import Service
from ibisagent.server.teaching import LEAST, PROCESS, Teacher, TeachingState


class TeachingView(BaseModel):
    """How far the teaching is, or how the last one ended.

    said: for users, in sentences. share: of the stage under way, in [0, 1]. seconds_left: of all. labelled: images and
    scans that can teach; new: those accepted since the last teaching; least: as many as it takes. learn_every: it
    starts by itself after so many new ones; None: when asked. agent: number of the taught agent that answers, 0: none.
    folder: where it is, for --policy; below the data folder where the server has a token.
    """

    state: TeachingState
    said: str
    share: float | None
    seconds_left: float | None
    labelled: int
    new: int
    least: int
    learn_every: int | None
    agent: int
    folder: str


def mount_teaching(
    app: FastAPI,
    service: Service,
    _threads: AgentThreads,
    *,
    learn_every: int | None = None,
    process: Sequence[str] = PROCESS,
    load: Callable[[str], Policy] = load_policy,
) -> Callable[[], AbstractAsyncContextManager[None]]:
    """Add the addresses, and the teacher as `service.teaching`; after the mounts of the page's API and MONAI Label.

    What it returns takes up what an earlier run of the server left. learn_every, process, load: see `Teacher`.
    """
    state = app.state
    examples = LabelledImages(service, state.worklist, state.scans, state.monai_images)
    teacher = service.teaching = Teacher(service, examples, learn_every=learn_every, process=process, load=load)

    def view() -> TeachingView:
        now, step = teacher.now, teacher.progress
        labelled, new = teacher.labelled_count
        folder = teacher.folder
        shown = "" if folder is None else str(folder.relative_to(service.folder) if state.keys.needed else folder)
        return TeachingView(
            state=now.state,
            said=teacher.said,
            share=step.done / step.total if step is not None and step.total else None,
            seconds_left=None if step is None else step.seconds_left,
            labelled=labelled,
            new=new,
            least=LEAST,
            learn_every=learn_every,
            agent=now.agent,
            folder=shown,
        )

    @app.get("/v1/teaching", tags=["teaching"])
    def look() -> TeachingView:
        """How far it is."""
        return view()

    @app.post("/v1/teaching", tags=["teaching"], status_code=202)
    def start() -> TeachingView:
        """Teach the policy what users accepted and corrected, in the background; where that helps, it answers then."""
        teacher.start()
        return view()

    @app.delete("/v1/teaching", tags=["teaching"])
    def stop() -> TeachingView:
        """End the teaching under way; nothing has changed then."""
        teacher.stop()
        return view()

    @app.delete("/v1/teaching/agent", tags=["teaching"])
    def forget() -> TeachingView:
        """Let the policy answer as the server was started with it."""
        teacher.forget()
        return view()

    @asynccontextmanager
    async def taken_up() -> AsyncIterator[None]:
        await run_in_threadpool(teacher.take_up)
        yield

    return taken_up
