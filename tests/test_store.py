"""Episodes survive the disk exactly; damaged, unrelated and newer files are refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibisagent.domain import Box, Click, Completion, Episode, Masks, MaskSelection, Reply, Stop, Turn, Undo
from ibisagent.errors import DataError
from ibisagent.store import RECORD_FORMAT, SCHEMA_VERSION, EpisodeStore, read_record, write_record

SIZE = (61, 83)


def mask(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(SIZE) < 0.4


def episode(case_id: str = "a.png#spleen", turns: int = 3) -> Episode:
    start = {"spleen": mask(0)}
    reply = Reply(
        "I look for <the> spleen \u00fc \U0001f9a9.",
        (Click(82, 60, False, "spleen"), Box(0, 1, 83, 61, "left; lobe"), Undo(2), Stop("", ("liver", "kidney"))),
    )
    states: list[Masks] = [start, *({"spleen": mask(n), "left; lobe": mask(-1 - n + 9)} for n in range(turns))]
    history = tuple(
        Turn(Completion("<think>\u00fc</think>", 17, 0.25), reply, before, after, 0.5)
        for before, after in pairwise(states)
    )
    if history:
        last = Turn(Completion("nonsense"), Reply(problem="no action"), history[-1].after, history[-1].after)
        history = (*history, last)
    return Episode(case_id, "Segment the spleen.", SIZE, "ab12", "a.png", start, history, "malformed", {"seed": "3"})


def same_masks(a: Masks, b: Masks) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def assert_same(a: Episode, b: Episode) -> None:
    for name in ("case_id", "query", "size", "image_sha256", "image_source", "stop"):
        assert getattr(a, name) == getattr(b, name)
    assert dict(a.provenance) == dict(b.provenance)
    assert same_masks(a.start, b.start)
    assert len(a.turns) == len(b.turns)
    for one, two in zip(a.turns, b.turns, strict=True):
        assert (one.completion, one.reply, one.segmenter_score) == (two.completion, two.reply, two.segmenter_score)
        assert same_masks(one.before, two.before)
        assert same_masks(one.after, two.after)


def test_shards_give_back_what_was_appended(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "episodes")
    written = [episode("a"), episode("b", turns=0), episode("c", turns=1)]
    store.append(written[:2], notes={"failures": ["x"]})
    store.append([])
    store.append(written[2:])
    again = EpisodeStore(tmp_path / "episodes")
    for one, two in zip(written, again.read(), strict=True):
        assert_same(one, two)
    assert set(again.open().column("case_id")) == {"a", "b", "c"}
    assert list(again.shards) == [0, 1, 2]
    assert [again.notes(shard) for shard in again.shards] == [{"failures": ["x"]}, {}, {}]


def test_same_episodes_same_bytes(tmp_path: Path) -> None:
    first = EpisodeStore(tmp_path / "1").append([episode()], notes={"b": 1, "a": 2})
    second = EpisodeStore(tmp_path / "2").append([episode()], notes={"a": 2, "b": 1})
    assert first.read_bytes() == second.read_bytes()
    write_record(episode(), tmp_path / "1.json")
    write_record(episode(), tmp_path / "2.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_shard_can_be_made_again(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append([episode("a")], shard=4)
    store.append([episode("b")], shard=4)
    store.append([episode("c")])
    assert [read.case_id for read in store.read()] == ["b", "c"]
    assert list(store.shards) == [4, 5]


def test_reading_changes_nothing_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".episodes-000000.parquet.1234.part").write_bytes(b"another process is writing")
    store = EpisodeStore(tmp_path)
    assert not store.shards
    assert list(store.read()) == []
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError, match="nowhere: no such folder"):
        list(EpisodeStore(tmp_path / "nowhere").read())
    assert not (tmp_path / "nowhere").exists()


def test_record_gives_back_what_was_written(tmp_path: Path) -> None:
    write_record(episode(), tmp_path / "record.json")
    assert_same(episode(), read_record(tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["format"], record["version"]) == (RECORD_FORMAT, SCHEMA_VERSION)
    assert record["turns"][0]["actions"][0] == {
        "kind": "click",
        "x": 82,
        "y": 60,
        "positive": False,
        "target": "spleen",
    }
    assert record["turns"][0]["masks"][0]["rle"]["size"] == list(SIZE)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
pixels = st.integers(0, 60)
actions = st.one_of(
    st.builds(Click, pixels, pixels, st.booleans(), texts),
    st.builds(lambda x, y, target: Box(x, y, x + 3, y + 1, target), pixels, pixels, texts),
    st.builds(Undo, st.integers(1, 999)),
    st.builds(Stop, texts, st.lists(texts, max_size=3).map(tuple)),
)
replies = st.builds(Reply, texts, st.lists(actions, max_size=4).map(tuple), st.none() | texts)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    text=texts, reply=replies, names=st.lists(texts, max_size=3, unique=True), tokens=st.none() | st.integers(0, 9**9)
)
def test_any_turn_survives(tmp_path: Path, text: str, reply: Reply, names: list[str], tokens: int | None) -> None:
    after = {name: mask(number) for number, name in enumerate(names)}
    turn = Turn(Completion(text, tokens), reply, {}, after, None)
    written = Episode("id", text or "?", SIZE, "", text, {}, (turn,), "max_turns", {text: text})
    write_record(written, tmp_path / "record.json")
    assert_same(written, read_record(tmp_path / "record.json"))
    store = EpisodeStore(tmp_path)
    store.append([written], shard=0)
    assert_same(written, next(store.read()))


def test_turns_must_follow_each_other(tmp_path: Path) -> None:
    turn = Turn(Completion(""), Reply(), {"spleen": mask(5)}, {"spleen": mask(5)})
    broken = Episode("id", "?", SIZE, "", "", {}, (turn,), "max_turns", {})
    with pytest.raises(DataError, match="does not start where"):
        write_record(broken, tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_record(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    refused(path, "cannot be read")
    for text, message in {
        "": "is not JSON",
        "[1]": "holds no JSON object",
        "{}": "is no episode record",
        '{"format": "ibisagent episode"}': "states no schema version",
        '{"format": "ibisagent episode", "version": true}': "states no schema version",
        f'{{"format": "ibisagent episode", "version": {SCHEMA_VERSION + 1}}}': "upgrade",
        '{"format": "ibisagent episode", "version": 1}': "is damaged",
        "[" * 100_000: "is not JSON",
    }.items():
        path.write_text(text)
        refused(path, message)
    path.write_bytes(b"\xff\xfe\x00")
    refused(path, "is not JSON")


def spoil(record: dict[str, Any], *keys: str | int, value: Any) -> dict[str, Any]:
    inner: Any = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return record


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("height",), 62),
        (("height",), None),
        (("case_id",), None),
        (("stop",), "bored"),
        (("turns",), "many"),
        (("turns", 0, "actions", 0, "x"), "left"),
        (("turns", 0, "actions", 0, "x"), None),
        (("turns", 0, "actions", 0, "x"), 10**12),
        (("turns", 0, "actions", 0, "kind"), "wish"),
        (("turns", 0, "actions", 1, "x1"), 0),
        (("turns", 0, "actions", 2, "steps"), 0),
        (("turns", 0, "masks", 0, "rle", "counts"), "0"),
        (("turns", 0, "masks", 0, "rle", "counts"), None),
        (("turns", 0, "masks", 0, "rle", "size"), [61, 83, 1]),
        (("turns", 0, "masks", 0, "rle", "size"), [83, 61]),
    ],
)
def test_damaged_records(tmp_path: Path, keys: tuple[str | int, ...], value: Any) -> None:
    path = tmp_path / "record.json"
    write_record(episode(), path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()), *keys, value=value)))
    refused(path, ".")


def test_damaged_unrelated_and_newer_shards(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    path = store.append([episode()])
    whole = path.read_bytes()

    def refused_shard(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            list(store.read())
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)

    path.write_bytes(b"")
    refused_shard("no Parquet file")
    path.write_bytes(whole[: len(whole) // 2])
    refused_shard("no Parquet file")
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 0xFF
    path.write_bytes(bytes(flipped))
    refused_shard("is damaged")
    pq.write_table(pa.table({"case_id": ["a"]}), path)
    refused_shard("states no schema version")
    pq.write_table(pa.table({"case_id": ["a"]}).replace_schema_metadata({"ibisagent.schema_version": "1"}), path)
    refused_shard("other columns")
    newer = pq.read_table(pa.BufferReader(whole)).replace_schema_metadata(
        {"ibisagent.schema_version": str(SCHEMA_VERSION + 1)}
    )
    pq.write_table(newer, path)
    refused_shard("upgrade")


def test_what_the_first_version_wrote_is_read(tmp_path: Path) -> None:
    for keep, meant in (("best", "best"), ("last", "last"), (None, "last")):
        provenance = {} if keep is None else {"keep": keep}
        store = EpisodeStore(tmp_path / str(keep))
        path = store.append([replace(episode(), provenance=provenance)])
        old = pq.read_table(path).drop_columns("mask_selection")
        pq.write_table(old.replace_schema_metadata({"ibisagent.schema_version": "1"}), path)
        record = tmp_path / f"{keep}.json"
        write_record(replace(episode(), provenance=provenance), record)
        plain = json.loads(record.read_text())
        assert plain.pop("mask_selection") == "best"
        record.write_text(json.dumps({**plain, "version": 1}))
        assert [one.mask_selection for one in store.read()] == [meant]
        assert [one.mask_selection for one in store.open()] == [meant]
        assert read_record(record).mask_selection == meant


def test_drafts_survive_and_older_episodes_have_none(tmp_path: Path) -> None:
    whole = episode()
    [turn, *others] = whole.turns
    draft = np.zeros(whole.size, bool)
    draft[1:3, 2:5] = True
    drafted = replace(turn, completion=replace(turn.completion, drafts={"liver": draft}))
    store = EpisodeStore(tmp_path / "new")
    path = store.append([replace(whole, turns=(drafted, *others)), replace(whole, turns=(), stop="max_turns")])
    write_record(replace(whole, turns=(drafted, *others)), tmp_path / "record.json")
    for read in (next(store.read()), store.open()[0], read_record(tmp_path / "record.json")):
        assert (read.turns[0].completion.drafts["liver"] == draft).all()
        assert all(not one.completion.drafts for one in read.turns[1:])

    new = pq.read_table(path)
    turns = new["turns"].to_pylist()
    fields = list(new.schema.field("turns").type.value_type)[:-1]
    plain = [[{key: value for key, value in one.items() if key != "drafts"} for one in row] for row in turns]
    old = pa.array(plain, pa.list_(pa.struct(fields)))
    earlier = new.set_column(new.column_names.index("turns"), pa.field("turns", old.type), old)
    pq.write_table(earlier.replace_schema_metadata({"ibisagent.schema_version": "2"}), path)
    first, second = store.read()
    assert [one.reply for one in first.turns] == [one.reply for one in whole.turns]
    assert [one.completion.drafts for one in first.turns] == [{} for _ in whole.turns]
    assert second.turns == ()


@pytest.mark.parametrize("selection", ["best", "last"])
def test_mask_selection_survives(tmp_path: Path, selection: MaskSelection) -> None:
    written = replace(episode(), mask_selection=selection)
    write_record(written, tmp_path / "record.json")
    EpisodeStore(tmp_path).append([written])
    [stored] = EpisodeStore(tmp_path).read()
    assert (read_record(tmp_path / "record.json").mask_selection, stored.mask_selection) == (selection, selection)


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used as a folder"):
        EpisodeStore(tmp_path / "file").append([])
