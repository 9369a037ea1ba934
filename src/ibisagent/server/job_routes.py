"""Batch jobs over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from enum import Enum
from typing import Annotated, Any, TypeAlias

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ibisagent.domain import MAX_QUERY_CHARS
from ibisagent.server.jobs import Job, JobState
from ibisagent.server.service import MissingError, Service

PART_BYTES = 2**18  # of an answer, sent at once

Tags: TypeAlias = list[str | Enum]  # as FastAPI wants them


class JobView(BaseModel):
    """A batch job. failures: what went wrong, by image; the others are not stopped by it."""

    id: str
    query: str
    state: JobState
    images: int
    done: int
    failures: dict[str, str]


def job_view(job: Job) -> JobView:
    """A job, for clients."""
    return JobView(
        id=job.id, query=job.query, state=job.state, images=len(job.names), done=job.done, failures=dict(job.failures)
    )


def file_answer(media_type: str) -> dict[int | str, dict[str, Any]]:
    """How an answer that is a file is described."""
    return {200: {"content": {media_type: {}}, "description": "the file"}}


def add_jobs(app: FastAPI, service: Service) -> None:
    """Add the addresses."""
    tags: Tags = ["jobs"]

    @app.post("/v1/jobs", tags=tags, status_code=202)
    async def submit(
        images: Annotated[list[UploadFile], File(description="PNG, JPEG, TIFF or BMP, any number")],
        query: Annotated[str, Form(min_length=1, max_length=MAX_QUERY_CHARS)],
        max_turns: Annotated[int | None, Form(ge=1, le=1000)] = None,
    ) -> JobView:
        """Segment many images with one query, in the background."""
        uploads = [(image.filename or f"image-{number}", await image.read()) for number, image in enumerate(images, 1)]
        return job_view(await run_in_threadpool(service.submit, uploads, query, max_turns))

    @app.get("/v1/jobs", tags=tags)
    def list_jobs() -> list[JobView]:
        """All jobs, oldest first."""
        return [job_view(job) for job in service.jobs]

    @app.get("/v1/jobs/{id}", tags=tags)
    def look(id: str) -> JobView:  # noqa: A002
        """How far a job is."""
        return job_view(service.job(id))

    @app.post("/v1/jobs/{id}/cancel", tags=tags)
    def cancel(id: str) -> JobView:  # noqa: A002
        """End a job after the images under way; what is done stays."""
        return job_view(service.cancel(id))

    @app.delete("/v1/jobs/{id}", tags=tags, status_code=204)
    def remove(id: str) -> None:  # noqa: A002
        """Forget a job that is over, and delete its files."""
        service.remove_job(id)

    @app.get("/v1/jobs/{id}/results", tags=tags, response_class=Response, responses=file_answer("application/zip"))
    def results(id: str, request: Request) -> Response:  # noqa: A002
        """A zip of what is done so far: masks, overlays, records. It is fetched once all of it has been taken."""
        whole, content = service.job(id).over, service.results(id)

        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(content), PART_BYTES):
                yield content[start : start + PART_BYTES]
            if whole and not await request.is_disconnected():  # whoever hung up comes back
                with suppress(MissingError):
                    await run_in_threadpool(service.note_fetched, id)

        headers = {"content-length": str(len(content))}
        return StreamingResponse(parts(), media_type="application/zip", headers=headers)
