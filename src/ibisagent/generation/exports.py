"""What trainers read: conversations for TRL and LLaMA-Factory, prompts for GRPO, Parquet for verl.

| folder | who reads it | undone turns |
|---|---|---|
| trl/ | TRL's SFTTrainer, `assistant_only_loss`, with `TRAINING_TEMPLATE` | message key "loss": false |
| sharegpt/ | LLaMA-Factory (`dataset_info.json`) | cut after each right reply: set `ibisagent_last`, `mask_history` |
| grpo/ | TRL's GRPOTrainer with our environment | (questions only) |
| verl/ | verl's RLHFDataset | (questions only) |

Files are named "<split>-<shard>"; the split "train" (see `filters.is_trained_on`) holds training phrasings only, the
others held-out ones only.
Image files are named by their content, so that conversations share them; paths are relative to the export folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ibisagent.datasets import CaseRow
from ibisagent.domain import Case, Episode, Image, Masks, Observation
from ibisagent.errors import DataError
from ibisagent.files import make_folder, png_bytes, safe_name, write_json, write_whole
from ibisagent.generation.config import FactoryConfig, Format, Question, read_table, write_table
from ibisagent.generation.filters import is_trained_on
from ibisagent.imaging.images import read_image
from ibisagent.imaging.masks import decode_rle, encode_rle
from ibisagent.protocol import Message, OverlayStyle, overlay, render

JPEG_QUALITY = 92
DATASET_INFO_NAME = "dataset_info.json"

TRAINING_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'user' if message['role'] == 'tool' else message['role'] -%}"
    "{{- '<|im_start|>' + role + '\n' -}}"
    "{%- if role == 'assistant' and message.get('loss', true) is not false -%}"
    "{%- generation -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    "{{- call['function']['name'] + (call['function']['arguments'] | tojson) -}}"
    "{%- endfor -%}{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>' -}}"
    "{%- endif -%}{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Chat template in the form of Qwen2.5-VL that marks what is learned: assistant turns without "loss": false.

Role "tool", as TRL calls what an environment shows, reads like "user"; "tool_calls" stand for replies in its checks.
"""

_CONTENT = pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))
_MASKS = pa.list_(pa.struct({"name": pa.string(), "size": pa.list_(pa.int32(), 2), "counts": pa.string()}))
TRL_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "family": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": _CONTENT, "loss": pa.bool_()})),
        "images": pa.list_(pa.string()),
        "height": pa.int32(),
        "width": pa.int32(),
    }
)
GRPO_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "family": pa.string(),
        "query": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": _CONTENT})),
        "images": pa.list_(pa.string()),
        "image": pa.string(),
        "image_sha256": pa.string(),
        "targets": _MASKS,
        "start": _MASKS,
        "absent": pa.list_(pa.string()),
        "answer": pa.string(),
        "dataset": pa.string(),
        "modality": pa.string(),
        "patient": pa.string(),
        "licence_class": pa.string(),
    }
)
VERL_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.struct({"image": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct({"id": pa.string(), "split": pa.string(), "index": pa.int64(), "query": pa.string()}),
    }
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """An exported conversation, read back. family: of its question. images: their files, in the order of the text."""

    id: str
    family: str
    messages: list[Message]
    images: list[Path]


def export_shard(
    out: Path,
    shard: int,
    episodes: Sequence[Episode],
    prompts: Sequence[Question],
    questions: Mapping[str, Question],
    rows: Mapping[str, CaseRow],
    cases: Mapping[str, Case],
    starts: Mapping[str, Masks],
    config: FactoryConfig,
) -> dict[str, int]:
    """Write one shard in every format of the settings; how many records each got.

    episodes: for conversations. prompts: questions for RL, whether they have an episode or not. starts: by expert
    episode.
    """
    images = _Images(out, shard, config)
    counts: dict[str, int] = {}
    by_split: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_split.setdefault(_split_of(questions[episode.case_id]), []).append(episode)
    for split, mine in sorted(by_split.items()):
        told = [_conversation(episode, questions[episode.case_id], cases, images, config) for episode in mine]
        if "trl" in config.formats:
            table = pa.Table.from_pylist(told, schema=TRL_SCHEMA)
            write_table(table, out / "trl" / f"{split}-{shard:06d}.parquet")
            counts[f"trl/{split}"] = len(told)
        if "sharegpt" in config.formats:
            for name, records in _sharegpt(told).items():
                path = out / "sharegpt" / f"{name}-{split}" / f"{shard:06d}.jsonl"
                make_folder(path.parent)
                lines = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)
                write_whole(lines.encode(), path)
                counts[f"sharegpt/{name}-{split}"] = len(records)
    asked: dict[str, list[Question]] = {}
    for question in prompts:
        if all(row in cases for row in question.rows) and (not question.start or question.expert in starts):
            asked.setdefault(_split_of(question), []).append(question)
    for split, chosen in sorted(asked.items()):
        records = [_prompt(question, rows, cases, starts, images, config) for question in chosen]
        if "grpo" in config.formats:
            write_table(
                pa.Table.from_pylist(records, schema=GRPO_SCHEMA), out / "grpo" / f"{split}-{shard:06d}.parquet"
            )
            counts[f"grpo/{split}"] = len(records)
        if "verl" in config.formats:
            verl = [_verl(record, split, shard * 1_000_000 + n) for n, record in enumerate(records)]
            write_table(pa.Table.from_pylist(verl, schema=VERL_SCHEMA), out / "verl" / f"{split}-{shard:06d}.parquet")
            counts[f"verl/{split}"] = len(verl)
    if "sharegpt" in config.formats:
        _write_dataset_info(out)
    counts["images"] = len(images.written)
    return counts


def _split_of(question: Question) -> str:
    """The name of its split in names of files."""
    return "train" if is_trained_on(question.split) else safe_name(question.split, set())


def remove_shard(out: Path, shard: int) -> None:
    """Remove every file that `export_shard` wrote of a shard."""
    for pattern in (f"*/*-{shard:06d}.parquet", f"sharegpt/*/{shard:06d}.jsonl"):
        for file in list(out.glob(pattern)):
            file.unlink()
    shutil.rmtree(out / "images" / f"{shard:06d}", ignore_errors=True)


class _Images:
    """Writes images under names that come from what they show; each once a shard."""

    def __init__(self, out: Path, shard: int, config: FactoryConfig) -> None:
        self._out, self._folder = out, Path("images") / f"{shard:06d}"
        self._suffix = "jpg" if config.image_format == "jpeg" else "png"
        self.written: dict[str, str] = {}
        make_folder(out / self._folder)

    def file(self, image: Image, masks: Masks, style: OverlayStyle) -> str:
        """The file that shows `masks` on `image`, relative to the export folder."""
        digest = hashlib.sha256(image.sha256.encode())
        for mask in masks.values():
            digest.update(np.packbits(mask).tobytes())
        name = digest.hexdigest()[:20]
        if name not in self.written:
            rendered = overlay(image, masks, style)
            relative = self._folder / f"{name}.{self._suffix}"
            if self._suffix == "jpg":
                buffer = io.BytesIO()
                rendered.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
                content = buffer.getvalue()
            else:
                content = png_bytes(rendered)
            write_whole(content, self._out / relative)
            self.written[name] = relative.as_posix()
        return self.written[name]


def _conversation(
    episode: Episode, question: Question, cases: Mapping[str, Case], images: _Images, config: FactoryConfig
) -> dict[str, Any]:
    image = cases[question.rows[0]].image
    masks = episode.turns[-1].before
    observation = Observation(episode.case_id, image, episode.query, masks, episode.turns[:-1])
    rendered = render(observation, dialect=config.dialect, history="full", style="colour", paint=images.file)
    wrong = episode.undone_turns
    messages: list[dict[str, Any]] = []
    files: list[str] = []
    for message in rendered:
        parts, seen = _stored(message["content"])
        files += seen
        number = sum(said["role"] == "assistant" for said in messages)
        loss = message["role"] == "assistant" and number not in wrong
        messages.append({"role": message["role"], "content": parts, "loss": loss})
    last = [{"type": "text", "text": episode.turns[-1].completion.text}]
    messages.append({"role": "assistant", "content": last, "loss": True})
    return {
        "id": episode.case_id,
        "family": question.family,
        "messages": messages,
        "images": files,
        "height": episode.size[0],
        "width": episode.size[1],
    }


def _stored(content: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    parts: list[dict[str, Any]] = []
    files: list[str] = []
    for part in content:
        if part["type"] == "image":
            files.append(part["image"])
            parts.append({"type": "image", "text": None})
        else:
            parts.append({"type": "text", "text": part["text"]})
    return parts, files


def _flat(content: Sequence[Mapping[str, Any]]) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def _sharegpt(told: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Whole conversations under "all"; those with wrong turns under "last", cut after each right reply."""
    sets: dict[str, list[dict[str, Any]]] = {"all": [], "last": []}
    for record in told:
        messages = record["messages"]
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if all(messages[index]["loss"] for index in replies):
            sets["all"].append(_sharegpt_record(record, record["id"], messages))
        else:
            sets["last"] += [
                _sharegpt_record(record, f"{record['id']}@{number}", messages[: index + 1])
                for number, index in enumerate(replies)
                if messages[index]["loss"]
            ]
    return {name: records for name, records in sets.items() if records}


def _sharegpt_record(record: Mapping[str, Any], name: str, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {
        "id": name,
        "messages": [{"role": message["role"], "content": _flat(message["content"])} for message in messages],
        "images": record["images"][:images],
    }


def _write_dataset_info(out: Path) -> None:
    """What LLaMA-Factory wants to know about the folders; the same for every shard."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {
        name: {
            "file_name": f"sharegpt/{folder}",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": tags | {"system_tag": "system"},
        }
        for name, folder in {"ibisagent": "all-train", "ibisagent_last": "last-train"}.items()
    }
    write_json(info, out / DATASET_INFO_NAME)


def _prompt(
    question: Question,
    rows: Mapping[str, CaseRow],
    cases: Mapping[str, Case],
    starts: Mapping[str, Masks],
    images: _Images,
    config: FactoryConfig,
) -> dict[str, Any]:
    case = cases[question.rows[0]]
    start = starts[question.expert] if question.start else {}
    observation = Observation(question.id, case.image, question.query, start)
    prompt, files = [], []
    for message in render(observation, dialect=config.dialect, style="colour", paint=images.file):
        parts, seen = _stored(message["content"])
        files += seen
        prompt.append({"role": message["role"], "content": parts})
    ground_truths = {
        name: ground_truth for row in question.rows for name, ground_truth in (cases[row].targets or {}).items()
    }
    row = rows[question.rows[0]]
    return {
        "id": question.id,
        "family": question.family,
        "query": question.query,
        "prompt": prompt,
        "images": files,
        "image": str(row.image),
        "image_sha256": case.image.sha256,
        "targets": _plain({name: ground_truths[name] for name in question.targets}),
        "start": _plain(start),
        "absent": question.absent,
        "answer": question.answer or None,
        "dataset": row.dataset,
        "modality": row.modality,
        "patient": row.patient,
        "licence_class": row.licence_class,
    }


def _plain(masks: Masks) -> list[dict[str, Any]]:
    return [{"name": name, **encode_rle(mask)} for name, mask in masks.items()]


def _verl(record: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
    ground_truth = {name: record[name] for name in ("targets", "start", "absent", "answer", "image", "image_sha256")}
    return {
        "data_source": f"ibisagent/{record['dataset']}",
        "prompt": [{"role": said["role"], "content": _flat(said["content"])} for said in record["prompt"]],
        "images": [{"image": file} for file in record["images"]],
        "ability": record["family"],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(ground_truth, ensure_ascii=False, sort_keys=True)},
        "extra_info": {"id": record["id"], "split": split, "index": index, "query": record["query"]},
    }


# ------------------------------------------------------------------------------------------------------- reading back


def read_trl(out: Path, split: str = "train") -> Iterator[Conversation]:
    """The conversations under `out`/trl. DataError if there are none, or images do not fit the text."""
    for record in _records(out, "trl", split):
        messages = [
            {**said, "content": [part if part["type"] == "text" else {"type": "image"} for part in said["content"]]}
            for said in record["messages"]
        ]
        images = [out / file for file in record["images"]]
        wanted = sum(part["type"] == "image" for said in messages for part in said["content"])
        if wanted != len(images):
            raise DataError(
                f"{out}: conversation {record['id']} speaks of {wanted} images and has {len(images)}; export again"
            )
        yield Conversation(record["id"], record["family"], messages, images)


def read_grpo(out: Path, split: str = "train") -> Iterator[dict[str, Any]]:
    """The prompts under `out`/grpo, one record for each question (see `GRPO_SCHEMA`)."""
    return _records(out, "grpo", split)


def _records(out: Path, format_: Format, split: str) -> Iterator[dict[str, Any]]:
    paths = sorted((out / format_).glob(f"{split}-*.parquet"))
    if not paths:
        raise DataError(f"{out / format_}: holds no {split}-*.parquet; run the stage export with this format")
    for path in paths:
        yield from read_table(path).to_pylist()


def prompt_case(name: str, query: str, ground_truth: Mapping[str, Any], folder: Path = Path()) -> Case:
    """The case of an exported prompt, with its image as it was before anything was drawn on it.

    ground_truth: a record of `read_grpo`, or the decoded ground truth of one for verl, which says less of the patient.
    folder: see `find_image`. DataError if the record is damaged or its image cannot be read.
    """
    try:
        targets = {mask["name"]: decode_rle(mask) for mask in ground_truth["targets"] or ()}
        start = {mask["name"]: decode_rle(mask) for mask in ground_truth["start"] or ()}
        absent, answer = list(ground_truth["absent"] or ()), ground_truth["answer"] or None
        source, sha256 = ground_truth["image"], ground_truth["image_sha256"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"prompt {name}: holds no ground truth as 'data build' writes it ({error!r}); export again"
        ) from error
    image = find_image(source, folder, sha256)
    targets |= {missing: np.zeros(image.size, dtype=bool) for missing in absent}
    meta = {fact: ground_truth[fact] for fact in ("dataset", "modality", "family") if fact in ground_truth}
    return Case(name, image, query, targets or None, start, answer, ground_truth.get("patient", ""), meta)


def find_image(source: str, folder: Path, sha256: str = "") -> Image:
    """The image that a record in `folder` names, where it says or relative to the folder or the one above.

    DataError if it is not there, or is not the one with the hash `sha256`.
    """
    places = [Path(source), folder / source, folder.parent / source]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"{source}: is not there, and {folder} needs it; put it back or build the data again")
    image = read_image(found)
    if sha256 and image.sha256 != sha256:
        raise DataError(f"{found}: is not the image that {folder} was made with; build the data again")
    return image
