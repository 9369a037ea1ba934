"""Settings of the factory, and the record of one question."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ibisagent.config import Recipe
from ibisagent.environment import MAX_TURNS
from ibisagent.errors import DataError
from ibisagent.files import make_folder, one_line, write_whole
from ibisagent.policies.base import random_of
from ibisagent.protocol import dialect_of

Stage = Literal["trajectories", "questions", "thoughts", "reflection", "filter", "export"]
STAGES: tuple[Stage, ...] = ("trajectories", "questions", "thoughts", "reflection", "filter", "export")
Format = Literal["trl", "sharegpt", "grpo", "verl"]


class EndpointConfig(BaseModel):
    """A teacher behind an OpenAI-compatible server; prices are per million tokens, in any one currency."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    model: str
    images: bool = True
    structured: bool = True
    max_tokens: int = Field(default=200, ge=16)
    temperature: float = Field(default=0.7, ge=0)
    concurrency: int = Field(default=8, ge=1)
    requests_per_minute: float = Field(default=0, ge=0, description="0: no limit")
    retries: int = Field(default=5, ge=0)
    pause_seconds: float = Field(default=1.0, ge=0, description="before the first retry; doubles, with jitter")
    timeout_seconds: float = Field(default=60.0, gt=0)
    price_in: float = Field(default=0, ge=0)
    price_out: float = Field(default=0, ge=0)
    budget: float | None = Field(default=None, ge=0)
    tokens_per_image: int = Field(default=800, ge=0, description="for the estimate before a request")


class FactoryConfig(Recipe):
    """What the factory makes of a data set; counts are questions for each image-mask pair, shares are of pairs."""

    seed: int = 0
    segmenter: str = "ibis-click"
    dialect: str = "ibis"
    shard_images: int = Field(default=16, ge=1, description="images that are worked on together: the unit of resuming")

    goal_iou: float = Field(default=0.92, gt=0, le=1, description="the expert stops here")
    max_clicks: int = Field(default=10, ge=1)
    patience: int = Field(default=3, ge=1, description="clicks without gain after which the expert gives up")
    jitter: float = Field(default=0.3, ge=0, le=1)
    box_first: float = Field(default=0.3, ge=0, le=1)

    referring: int = Field(default=2, ge=0)
    reasoning: int = Field(default=2, ge=0)
    existence: int = Field(default=1, ge=0)
    absent: int = Field(default=2, ge=0)
    multiple: int = Field(default=1, ge=0, description="for each image with two objects or more")
    refinement: int = Field(default=2, ge=0)
    vqa: int = Field(default=3, ge=0)
    self_correction: float = Field(default=0.4, ge=0, le=1)
    inconsistency: float = Field(default=0.4, ge=0, le=1)

    teacher: Literal["rules", "endpoint"] = "rules"
    endpoint: EndpointConfig | None = None

    min_iou: float = Field(default=0.87, ge=0, le=1)
    max_turns: int = Field(default=MAX_TURNS, ge=1)
    near_duplicate_bits: int = Field(
        default=6, ge=0, le=15, description="of 256: images that differ by less are copies"
    )

    formats: tuple[Format, ...] = ("trl", "sharegpt", "grpo", "verl")
    image_format: Literal["jpeg", "png"] = "jpeg"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        dialect_of(self.dialect)
        if self.teacher == "endpoint" and self.endpoint is None:
            raise ValueError("teacher = 'endpoint' needs a table [endpoint] with url and model")
        return self

    def random(self, *what: object) -> np.random.Generator:
        """Draws that depend on the seed and `what` alone."""
        return random_of(self.seed, *what)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image, with its answer.

    rows: ids of the pairs whose masks are its ground truth. expert: the expert's episode that answers it; "" where
    words do.
    answer: of a closed question, else "". claim: what the user says that is not so. start: whether a mask is given.
    """

    id: str
    rows: list[str]
    family: str
    kind: str
    phrasing: int
    held_out: bool
    query: str
    answer: str
    targets: list[str]
    absent: list[str]
    expert: str
    claim: str
    start: bool
    image: str
    split: str
    patient: str
    modality: str
    dataset: str
    licence_class: str


_TYPES: dict[str, pa.DataType] = {
    "rows": pa.list_(pa.string()),
    "targets": pa.list_(pa.string()),
    "absent": pa.list_(pa.string()),
    "phrasing": pa.int32(),
    "held_out": pa.bool_(),
    "start": pa.bool_(),
}
QUESTION_SCHEMA = pa.schema({field.name: _TYPES.get(field.name, pa.string()) for field in fields(Question)})
NOTES_KEY = b"ibisagent.notes"


def write_questions(questions: list[Question], path: Path, notes: dict[str, Any]) -> None:
    """Write `questions` as Parquet, whole or not at all, with `notes` in the same file."""
    table = pa.Table.from_pylist([asdict(question) for question in questions], schema=QUESTION_SCHEMA)
    table = table.replace_schema_metadata({NOTES_KEY: json.dumps(notes, sort_keys=True)})
    write_table(table, path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write `table` as Parquet, whole or not at all."""
    make_folder(path.parent)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_whole(sink.getvalue().to_pybytes(), path)


def read_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote. DataError if the file is damaged or not there."""
    return [Question(**row) for row in read_table(path).to_pylist()]


def read_table(path: Path) -> pa.Table:
    """A Parquet file. DataError if it is damaged or not there."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); delete it and run its stage again") from error


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a file of `write_questions`."""
    try:
        loaded: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[NOTES_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); delete it and run its stage again") from error
    return loaded
