"""Episodes on disk: a folder of Parquet shards for many, a JSON record for one.

Both hold the same plain form of an episode, which `SCHEMA` defines. Masks are COCO run-length codes; a turn stores only
its masks after it, as those before it are the ones after the turn before. Nothing in a file depends on when or where it
was written, so the same episodes give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ibisagent.domain import (
    Action,
    Box,
    Click,
    Completion,
    Episode,
    Mask,
    Masks,
    MaskSelection,
    Reply,
    Stop,
    StopReason,
    Turn,
    Undo,
    check_mask_selection,
    check_masks,
    same_masks,
)
from ibisagent.errors import DataError, TooLargeError
from ibisagent.files import make_folder, one_line, write_whole
from ibisagent.imaging import limits
from ibisagent.imaging.masks import decode_rle, encode_rle

SCHEMA_VERSION = 3
"""3 has the `drafts` of turns, 2 the column `mask_selection`, which version 1 said in `provenance`: all are read."""
RECORD_FORMAT = "ibisagent episode"

_ACTIONS: Mapping[str, type[Click] | type[Box] | type[Undo] | type[Stop]] = MappingProxyType(
    {"click": Click, "box": Box, "undo": Undo, "stop": Stop}
)
_KINDS = {action: kind for kind, action in _ACTIONS.items()}
_MASKS = pa.list_(
    pa.struct({"name": pa.string(), "rle": pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})})
)
_ACTION = pa.struct(
    {
        "kind": pa.string(),
        **{name: pa.int32() for name in ("x", "y", "x0", "y0", "x1", "y1", "steps")},
        "positive": pa.bool_(),
        "target": pa.string(),
        "answer": pa.string(),
        "absent": pa.list_(pa.string()),
    }
)
_TURN = pa.struct(
    {
        "text": pa.string(),
        "tokens": pa.int64(),
        "seconds": pa.float64(),
        "thought": pa.string(),
        "actions": pa.list_(_ACTION),
        "problem": pa.string(),
        "masks": _MASKS,
        "segmenter_score": pa.float64(),
        "drafts": _MASKS,
    }
)
SCHEMA = pa.schema(
    {
        "case_id": pa.string(),
        "query": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "image_sha256": pa.string(),
        "image_source": pa.string(),
        "start": _MASKS,
        "turns": pa.list_(_TURN),
        "stop": pa.string(),
        "made_by": pa.map_(pa.string(), pa.string()),
        "mask_selection": pa.string(),
    }
)
_VERSION_KEY = b"ibisagent.schema_version"
_NOTES_KEY = b"ibisagent.notes"
_SHARD = re.compile(r"episodes-(\d{6})\.parquet")
_MOST_EPISODES = 2**22  # of one shard: run lengths let a few bytes claim any number of rows
_STOPS = get_args(StopReason)


class EpisodeStore:
    """Episodes in a folder of numbered Parquet shards `episodes-000000.parquet`, ...

    A shard appears whole or not at all. One process at a time may write to a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """folder: made by the first `append`, if it is not there."""
        self.folder = Path(folder)

    @property
    def shards(self) -> dict[int, Path]:
        """The finished shards by number, in order."""
        if not self.folder.is_dir():
            return {}
        found = {int(match[1]): path for path in self.folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
        return dict(sorted(found.items()))

    def append(
        self, episodes: Iterable[Episode], *, shard: int | None = None, notes: Mapping[str, Any] = MappingProxyType({})
    ) -> Path:
        """Write `episodes` (none is fine) as one shard and return its file.

        shard: its number; an existing one is replaced; default the next free one. notes: facts that can be written as
        JSON, kept in the same file so that they appear with it. Raises DataError if it cannot be written.
        """
        number = max(self.shards, default=-1) + 1 if shard is None else shard
        table = _table([_plain_episode(episode) for episode in episodes], self.folder)
        table = table.replace_schema_metadata(
            {_VERSION_KEY: str(SCHEMA_VERSION), _NOTES_KEY: json.dumps(dict(notes), sort_keys=True)}
        )
        make_folder(self.folder)
        path = self.folder / f"episodes-{number:06d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_whole(sink.getvalue().to_pybytes(), path)
        return path

    def read(self) -> Iterator[Episode]:
        """Every episode, shard by shard.

        DataError for a damaged or unrelated shard, one of a newer version, or no folder at all.
        """
        yield from (episode for shard in self._present() for episode in self.read_shard(shard))

    def read_shard(self, shard: int) -> Iterator[Episode]:
        """Every episode of one shard. DataError if the shard is damaged, unrelated, of a newer version or not there."""
        path = self.shards.get(shard)
        if path is None:
            raise DataError(f"{self.folder}: has no shard {shard}; make it again")
        for row in _read_shard(path).to_pylist():
            yield _episode(row, str(path))

    def open(self) -> StoredEpisodes:
        """Every episode by its number, each decoded when asked for. DataError as `read`."""
        return StoredEpisodes(self._present().values())

    def _present(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; give one that 'ibisagent data trajectories' wrote")
        return self.shards

    def notes(self, shard: int) -> dict[str, Any]:
        """The notes that were appended with shard number `shard`; reads no episode."""
        path = self.shards[shard]
        return _load_json(_metadata(path).get(_NOTES_KEY, b"{}"), str(path))


class StoredEpisodes(Sequence[Episode]):
    """Episodes of Parquet shards, kept as compact columns: 100,000 fit where 1,000 decoded ones would."""

    def __init__(self, shards: Iterable[Path]) -> None:
        """shards: files of an `EpisodeStore`, in order. DataError for a damaged or unrelated one."""
        self._table = pa.concat_tables([SCHEMA.empty_table(), *map(_read_shard, shards)])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        """The episode number `index`, decoded now."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        [plain] = self._table.slice(index, 1).to_pylist()
        return _episode(plain, f"episode {index}")

    def column(self, name: str) -> list[Any]:
        """One column of `SCHEMA` for all episodes, as plain values; nothing else is decoded."""
        return list(self._table[name].to_pylist())

    def reply_lengths(self) -> list[list[int]]:
        """Of each episode, how many characters its replies have; no mask is decoded."""
        turns = self._table["turns"]
        texts = pc.struct_field(pc.list_flatten(turns), "text")
        characters = iter(pc.utf8_length(texts).to_pylist())
        counts = pc.list_value_length(turns).to_pylist()
        return [[next(characters) or 0 for _ in range(count or 0)] for count in counts]


def write_record(episode: Episode, path: str | Path) -> None:
    """Write one episode as JSON: every turn, thought, action and mask, model names, hashes and seeds."""
    write_whole(record_json(episode), path)


def record_json(episode: Episode) -> bytes:
    """What `write_record` writes."""
    return (json.dumps(plain_record(episode), indent=1) + "\n").encode("ascii")


def plain_record(episode: Episode) -> dict[str, Any]:
    """What `write_record` writes, as lists, texts and numbers."""
    where = Path(f"record of case {episode.case_id}")
    plain = _table([_plain_episode(episode)], where).to_pylist(maps_as_pydicts="strict")[0]
    return {"format": RECORD_FORMAT, "version": SCHEMA_VERSION, **_without_none(plain)}


def read_record(path: str | Path) -> Episode:
    """The episode that `write_record` wrote. DataError if the file is damaged, unrelated or of a newer version."""
    path = Path(path)
    try:
        record = _load_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a record.json") from error
    return read_plain_record(record, str(path))


def read_plain_record(record: Mapping[str, Any], where: str) -> Episode:
    """The episode that `plain_record` made plain. DataError if it is damaged, unrelated or of a newer version."""
    if record.get("format") != RECORD_FORMAT:
        raise DataError(f"{where}: is no episode record; give a file that 'ibisagent segment' wrote")
    _check_version(record.get("version"), where)
    plain = {name: value for name, value in record.items() if name not in ("format", "version")}
    return _episode(_table([plain], Path(where)).to_pylist()[0], where)


def plain_turn(turn: Turn) -> dict[str, Any]:
    """A turn as lists, texts and numbers, without the masks before it: those are known where it stands."""
    return {
        "text": turn.completion.text,
        "tokens": turn.completion.tokens,
        "seconds": turn.completion.seconds,
        "thought": turn.reply.thought,
        "actions": [{"kind": _KINDS[type(action)], **asdict(action)} for action in turn.reply.actions],
        "problem": turn.reply.problem,
        "masks": plain_masks(turn.after),
        "segmenter_score": turn.segmenter_score,
        "drafts": plain_masks(turn.completion.drafts) or None,
    }


def read_turn(plain: Mapping[str, Any], before: Masks, size: tuple[int, int], where: str) -> Turn:
    """The turn that `plain_turn` wrote, of an image of `size` (H, W). DataError if it is damaged."""
    with _damage_told(where):
        return _turn(plain, before, size, where)


def plain_masks(masks: Masks) -> list[dict[str, Any]]:
    """Masks as names and run-length codes."""
    return [{"name": name, "rle": encode_rle(mask)} for name, mask in masks.items()]


def read_plain_masks(plain: list[Mapping[str, Any]], size: tuple[int, int], where: str) -> Masks:
    """The masks that `plain_masks` wrote, each of `size` (H, W). DataError if they are damaged."""
    with _damage_told(where):
        return _masks(plain, size, where)


@contextmanager
def _damage_told(where: str) -> Iterator[None]:
    """What plain values of another form raise, as one DataError."""
    try:
        yield
    except TooLargeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: is damaged ({error})") from error


def _load_json(content: bytes, where: str) -> dict[str, Any]:
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}); make it again") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{where}: holds no JSON object; make it again")
    return loaded


def _check_version(version: object, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DataError(f"{where}: states no schema version; it was not written by ibisagent, or is damaged")
    if version > SCHEMA_VERSION:
        raise DataError(f"{where}: has schema version {version}, this ibisagent reads {SCHEMA_VERSION}; upgrade it")


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is damaged or no Parquet file; delete it and make it again") from error
    version = metadata.get(_VERSION_KEY, b"")
    _check_version(int(version) if version.isdigit() else None, str(path))
    return dict(metadata)


def _read_shard(path: Path) -> pa.Table:
    _metadata(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            said = file.metadata
            groups = (said.row_group(number) for number in range(said.num_row_groups))
            limits.check_unpacked(sum(group.total_byte_size for group in groups), path)
            if said.num_rows > _MOST_EPISODES:
                raise TooLargeError(f"{path}: {said.num_rows} episodes, at most {_MOST_EPISODES} are read; divide it")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is damaged ({one_line(error, 200)}); delete it and make it again") from error
    if table.column_names == SCHEMA.names[:-1]:  # version 1
        table = table.append_column(SCHEMA.field("mask_selection"), pa.nulls(len(table), pa.string()))
    if "turns" in table.column_names:
        table = _with_drafts(table)
    if table.schema.remove_metadata() != SCHEMA:
        raise DataError(f"{path}: has other columns than an episode store; it was not written by ibisagent")
    return table


def _with_drafts(table: pa.Table) -> pa.Table:
    """The turns of versions 1 and 2 had no drafts."""
    turns = table["turns"].combine_chunks()
    if turns.type != pa.list_(pa.struct(list(_TURN)[:-1])):
        return table
    kept = turns.flatten()
    parts = [*kept.flatten(), pa.nulls(len(kept), _MASKS)]
    offsets = pa.concat_arrays(
        [pa.array([0], pa.int32()), pc.cumulative_sum(pc.fill_null(pc.list_value_length(turns), 0))]
    )
    whole = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(parts, fields=list(_TURN)))
    return table.set_column(table.column_names.index("turns"), SCHEMA.field("turns"), whole)


def _table(plain: list[dict[str, Any]], where: Path) -> pa.Table:
    """Plain episodes as a table; this is also what checks the types of a record."""
    try:
        return pa.Table.from_pylist(plain, schema=SCHEMA)
    except (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: does not hold an episode as expected ({one_line(error, 200)})") from error


def _plain_episode(episode: Episode) -> dict[str, Any]:
    turns = []
    before = episode.start
    for turn in episode.turns:
        if not same_masks(turn.before, before):
            raise DataError(f"episode of case {episode.case_id}: a turn does not start where the one before it ended")
        before = turn.after
        turns.append(plain_turn(turn))
    return {
        "case_id": episode.case_id,
        "query": episode.query,
        "height": episode.size[0],
        "width": episode.size[1],
        "image_sha256": episode.image_sha256,
        "image_source": episode.image_source,
        "start": plain_masks(episode.start),
        "turns": turns,
        "stop": episode.stop,
        "made_by": dict(sorted(episode.provenance.items())),
        "mask_selection": episode.mask_selection,
    }


def _without_none(plain: Any) -> Any:
    """The same lists and objects without the keys that hold nothing."""
    if isinstance(plain, dict):
        return {name: _without_none(value) for name, value in plain.items() if value is not None}
    return [_without_none(value) for value in plain] if isinstance(plain, list) else plain


def _episode(plain: Mapping[str, Any], where: str) -> Episode:
    try:
        size = (int(plain["height"]), int(plain["width"]))
        _check_cost(plain, size, where)
        start = _masks(plain["start"] or [], size, "start")
        turns: list[Turn] = []
        for turn in plain["turns"] or []:
            before = turns[-1].after if turns else start
            turns.append(_turn(turn, before, size, f"turn {len(turns) + 1}"))
        for name in ("case_id", "query", "image_sha256", "image_source"):
            if plain[name] is None:
                raise KeyError(name)
        if plain["stop"] not in _STOPS:
            raise ValueError(f"stop is '{plain['stop']}'")
        provenance = dict(plain["made_by"] or ())
        return Episode(
            plain["case_id"],
            plain["query"],
            size,
            plain["image_sha256"],
            plain["image_source"],
            start,
            tuple(turns),
            plain["stop"],
            provenance,
            _mask_selection(plain["mask_selection"], provenance),
        )
    except TooLargeError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # DataError and ConfigError are ValueErrors
        case_id = plain.get("case_id")
        raise DataError(f"{where}: is damaged (episode of case {case_id}, {error}); make it again") from error


def _check_cost(plain: Mapping[str, Any], size: tuple[int, int], where: str) -> None:
    """TooLargeError where the masks of an episode would take more memory than a volume may."""
    of_turns = [turn.get(kind) or [] for turn in plain["turns"] or [] for kind in ("masks", "drafts")]
    masks = [*(plain["start"] or []), *(mask for masks in of_turns for mask in masks)]
    limits.check_pixels(*size, where)
    limits.check_unpacked(len({mask["rle"]["counts"] for mask in masks}) * size[0] * size[1], where)


def _mask_selection(said: str | None, provenance: Mapping[str, str]) -> MaskSelection:
    """As recorded. Version 1 recorded it where the masks were chosen among, as `keep`; elsewhere they were the last."""
    return check_mask_selection(provenance.get("keep", "last") if said is None else said)


def _turn(plain: Mapping[str, Any], before: Masks, size: tuple[int, int], where: str) -> Turn:
    reply = Reply(plain["thought"] or "", tuple(_action(action) for action in plain["actions"] or []), plain["problem"])
    drafts = _masks(plain.get("drafts") or [], size, where)  # of older versions there are none
    completion = Completion(plain["text"] or "", plain["tokens"], plain["seconds"] or 0.0, drafts)
    return Turn(completion, reply, before, _masks(plain["masks"] or [], size, where), plain["segmenter_score"])


def _action(plain: Mapping[str, Any]) -> Action:
    cls = _ACTIONS[plain["kind"]]
    fields = {name: plain[name] for name in cls.__dataclass_fields__}
    if cls is Stop:
        fields["absent"] = tuple(fields["absent"] or ())
    if None in fields.values():
        raise ValueError(f"a {plain['kind']} lacks one of {', '.join(fields)}")
    return cls(**fields)


@lru_cache(maxsize=512)  # episodes of one image share many masks
def _decoded(size: tuple[int, ...], counts: str) -> Mask:
    mask = decode_rle({"size": size, "counts": counts})
    mask.flags.writeable = False
    return mask


def _masks(plain: list[Mapping[str, Any]], size: tuple[int, int], where: str) -> Masks:
    for mask in plain:  # before room is made for what it claims
        if tuple(mask["rle"]["size"]) != size:
            raise ValueError(
                f"{where}: mask '{mask['name']}' is of size {str(tuple(mask['rle']['size']))[:40]}, not {size}"
            )
    masks = {str(mask["name"] or ""): _decoded(tuple(mask["rle"]["size"]), mask["rle"]["counts"]) for mask in plain}
    check_masks(masks, size, where)
    return masks
