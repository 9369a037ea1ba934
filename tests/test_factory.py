"""The factory: every question has an answer or a reason, a killed run ends with the same bytes, exports come back."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import contents, ibisagent, killed
from PIL import Image as PillowImage

from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.datasets.leaks import fingerprint
from ibisagent.domain import Click, Episode, Image, Reply, Stop, Undo
from ibisagent.errors import ConfigError
from ibisagent.generation import exports, filters
from ibisagent.generation.config import FactoryConfig, read_questions, read_table
from ibisagent.generation.expert_episodes import RecallingSegmenter, corrupted, unrelated
from ibisagent.generation.stages import Plan, Worker, build, estimate
from ibisagent.generation.teacher.phrasings import PHRASINGS, phrasings
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.imaging.masks import iou
from ibisagent.protocol import parse
from ibisagent.segmenters import load_segmenter
from ibisagent.store import EpisodeStore

SIZE = (61, 83)
FAMILIES = {"referring", "reasoning", "existence", "multiple", "refinement", "vqa", "inconsistency", "correction"}
CONFIG = FactoryConfig(segmenter="region", shard_images=3, self_correction=0.8, inconsistency=0.8, image_format="png")


def write_phantoms(folder: Path, count: int) -> None:
    """Images with a bright disc ("spleen") and, on every other one, a dark one ("kidney"); the last is for "val"."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for number in range(count):
        draw = np.random.default_rng(number)
        split = "val" if number == count - 1 else "train"
        for name in (split, f"{split}_mask"):
            (folder / "Phantoms" / name).mkdir(parents=True, exist_ok=True)
        x, y, radius = draw.integers(14, 30), draw.integers(15, 45), draw.integers(7, 11)
        spleen = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        kidney = (columns - 62) ** 2 + (rows - y) ** 2 <= 36
        level = 110 + draw.integers(0, 20, SIZE) + 90 * spleen - (90 * kidney if number % 2 else 0)
        stem = f"p{number}_{'CT' if number % 3 else 'MRI'}_abdomen"
        write_png(np.repeat(level[..., None], 3, axis=2).astype(np.uint8), folder / "Phantoms" / split / f"{stem}.png")
        write_mask_png(spleen, folder / "Phantoms" / f"{split}_mask" / f"{stem}_spleen.png")
        if number % 2:
            write_mask_png(kidney, folder / "Phantoms" / f"{split}_mask" / f"{stem}_kidney.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, 8)
    return folder


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    build(Plan(read_cases(data), out, CONFIG))
    return out


def all_questions(data: Path, out: Path) -> list:  # type: ignore[type-arg]
    worker = Worker(Plan(read_cases(data), out, CONFIG))
    return [question for shard in range(worker.shards) for question in worker.questions(shard)]


def test_every_question_ends_as_an_episode_or_as_a_reason(data: Path, made: Path) -> None:
    card = json.loads((made / "card.json").read_bytes())
    assert card["pairs"] == 12
    assert card["failed_pairs"] == 0
    assert card["questions_per_pair"] >= 10
    assert card["questions"] == card["kept"] + sum(card["rejected"].values())
    assert card["kept"] > 0.8 * card["questions"]
    assert set(card["kept_by_family"]) == FAMILIES
    assert card["overall"]["iou"] >= CONFIG.min_iou
    ids = [question.id for question in all_questions(data, made)]
    assert len(ids) == len(set(ids)) == card["questions"]
    assert "| CT |" in (made / "card.md").read_text()


def test_phrasings_are_many_and_some_are_kept_back(data: Path, made: Path) -> None:
    for kind, texts in PHRASINGS.items():
        assert len(set(texts)) == len(texts) >= 20
        trained, held = (
            {number for number, _ in phrasings(kind, held_out=True)},
            {number for number, _ in phrasings(kind, held_out=False)},
        )
        assert trained
        assert held
        assert not trained & held
    for question in all_questions(data, made):
        assert question.held_out is (question.split == "val")
        assert (question.phrasing in {n for n, _ in phrasings(question.kind, held_out=True)}) is question.held_out


def test_absent_objects_are_refused_without_a_click(made: Path) -> None:
    episodes = [e for e in EpisodeStore(made / "filter").read() if e.answer.absent]
    assert episodes == [] or all(episode.clicks == 0 and not episode.masks for episode in episodes)
    assert any(episode.answer.absent == ("kidney",) for episode in episodes)


def test_mistakes_are_visible_taken_back_and_not_judged(made: Path, data: Path) -> None:
    families = {question.id: question.family for question in all_questions(data, made)}
    cases = read_cases(data).by_id
    self_correcting = [e for e in EpisodeStore(made / "filter").read() if families[e.case_id] == "correction"]
    assert self_correcting
    for episode in self_correcting:
        wrong = episode.undone_turns
        assert len(wrong) == 1
        turn = episode.turns[min(wrong)]
        ground_truth = cases[episode.case_id.split("?")[0]].targets[
            "spleen" if "#spleen" in episode.case_id else "kidney"
        ]  # type: ignore[index]
        empty = np.zeros(SIZE, dtype=bool)
        name = next(iter(turn.after))
        before, after = turn.before.get(name, empty), turn.after[name]
        assert not np.array_equal(before, after)
        assert not before.any() or iou(after, ground_truth) < iou(before, ground_truth)
        following = episode.turns[min(wrong) + 1]
        assert following.reply.actions == (Undo(1),)
        assert {key: mask.tobytes() for key, mask in following.after.items()} == {
            key: mask.tobytes() for key, mask in turn.before.items()
        }


def test_inconsistent_requests_are_named(made: Path, data: Path) -> None:
    questions = {question.id: question for question in all_questions(data, made)}
    found = [e for e in EpisodeStore(made / "filter").read() if questions[e.case_id].family == "inconsistency"]
    assert found
    for episode in found:
        question = questions[episode.case_id]
        first = episode.turns[0].reply
        if question.claim:
            assert question.claim in first.thought
        else:
            assert episode.start
            assert {a.positive for a in first.actions if isinstance(a, Click)} == {True, False}


def test_predictions_are_shared(data: Path) -> None:
    segmenter = RecallingSegmenter(load_segmenter("region"))
    image = read_cases(data)[0].image
    session = segmenter.open(image)
    first = session.predict([Click(20, 20, True, "a")])
    assert session.predict([Click(20, 20, True, "b")]) is first
    session.predict([Click(20, 20, True, "a"), Click(3, 3, False, "a")], first.logits)
    assert segmenter.calls == 2


def test_start_masks_are_corrupted_and_unrelated_ones_are_elsewhere() -> None:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    ground_truth = (columns - 30) ** 2 + (rows - 30) ** 2 <= 100
    for seed in range(20):
        start = corrupted(ground_truth, np.random.default_rng(seed))
        assert start is not None
        assert 0.3 <= iou(start, ground_truth) <= 0.85
        other = unrelated(ground_truth, [], np.random.default_rng(seed))
        assert other is not None
        assert not (other & ground_truth).any()


def test_a_killed_run_ends_with_the_same_bytes(data: Path, made: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ibisagent.datasets import read_cases;"
        "from ibisagent.generation.config import FactoryConfig; from ibisagent.generation.stages import Plan, build;"
        f"build(Plan(read_cases({str(data)!r}), Path(sys.argv[1]), FactoryConfig.model_validate_json(sys.argv[2])),"
        "progress=lambda *said: print(*said, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), CONFIG.model_dump_json()]
    draw = random.Random(3)
    kills = 0
    for _ in range(5):
        # each line is a finished shard, or the start of a stage
        kills += killed(command, after_lines=draw.randrange(1, 5), pause=draw.random() * 0.05)
    assert kills == 5
    half = next((tmp_path / "out").iterdir())
    (tmp_path / "out" / "trajectories" / ".episodes-000001.parquet.x.part").write_bytes(b"half")
    assert half.exists()
    build(Plan(read_cases(data), tmp_path / "out", CONFIG))
    assert contents(tmp_path / "out") == contents(made)


def test_pairs_whose_files_changed_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where another shard's image was kept out as a copy of one that is no copy any more."""
    write_phantoms(tmp_path / "data", 8)
    folder = tmp_path / "data" / "Phantoms"
    tested, trained = next((folder / "val").glob("p7_*")), next((folder / "train").glob("p0_*"))
    original = tested.read_bytes()
    tested.write_bytes(trained.read_bytes())
    build(Plan(read_cases(tmp_path / "data"), tmp_path / "out", CONFIG))
    assert str(trained) in (tmp_path / "out" / "overlaps.json").read_text()
    tested.write_bytes(original)
    mask = next((folder / "val_mask").glob("p7_*_spleen.png"))
    write_mask_png(np.pad(np.ones((20, 20), dtype=bool), ((20, 21), (10, 53))), mask)
    build(Plan(read_cases(tmp_path / "data"), tmp_path / "out", CONFIG))
    assert "the files of 2 of 12 pairs have changed" in caplog.text
    build(Plan(read_cases(tmp_path / "data"), tmp_path / "fresh", CONFIG))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_stages_run_alone_and_in_order_only(data: Path, made: Path, tmp_path: Path) -> None:
    plan = Plan(read_cases(data), tmp_path / "out", CONFIG)
    with pytest.raises(ConfigError, match="stage thoughts needs stage trajectories"):
        build(plan, ["thoughts"])
    build(plan, ["trajectories"])
    assert estimate(plan)["price"] == 0
    build(plan, ["questions"])
    assert [q.id for q in read_questions(tmp_path / "out" / "questions" / "questions-000000.parquet")]
    with pytest.raises(ConfigError, match="another run \\(min_iou was"):
        build(Plan(read_cases(data), tmp_path / "out", CONFIG.model_copy(update={"min_iou": 0.5})), ["questions"])


def test_unreadable_pairs_are_named_and_cost_no_other(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "Phantoms" / "train").iterdir())[0]
    cases = read_cases(tmp_path / "data")
    broken.write_bytes(b"no image")
    card = build(Plan(cases, tmp_path / "out", CONFIG), ["trajectories", "questions"])
    lost = sum(row.image == broken for row in cases.rows)
    assert card["failed_pairs"] == lost
    assert all(broken.name in failure["error"] for failure in card["failures"])
    assert card["questions"] >= 10 * (len(cases) - lost)


def test_overlaps_between_splits_are_found(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = [np.kron(draw.integers(0, 255, (12, 17, 3)), np.ones((5, 5, 1))).astype(np.uint8) for _ in range(3)]
    noisy = np.clip(images[0].astype(int) + draw.integers(-2, 3, images[0].shape), 0, 255).astype(np.uint8)
    codes = {
        "a": fingerprint(images[0]),
        "b": fingerprint(noisy),
        "c": fingerprint(images[1]),
        "d": fingerprint(images[2]),
    }
    splits = {"a": ("train", "p1"), "b": ("val", "p2"), "c": ("train", "p3"), "d": ("test", "p3")}
    groups = [[CaseRow(n, Path(n), None, "x", "q", split=s, patient=p)] for n, (s, p) in splits.items()]
    assert filters.find_overlaps(groups, codes, 12) == {
        "a": "near duplicate in another split",
        "c": "patient in another split",
    }


# ----------------------------------------------------------------------------------------------------------- exports


def replies_of(conversation: exports.Conversation) -> list[str]:
    said = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    return ["".join(part["text"] for part in parts) for parts in said]


def learned_of(conversation: exports.Conversation) -> list[bool]:
    return [message["loss"] for message in conversation.messages if message["role"] == "assistant"]


@pytest.mark.parametrize("dialect", ["ibis", "paper", "released"])
def test_conversations_come_back_with_the_same_actions(data: Path, made: Path, tmp_path: Path, dialect: str) -> None:
    out, config = made, CONFIG
    if dialect != "ibis":
        out, config = tmp_path / dialect, CONFIG.model_copy(update={"dialect": dialect})
        build(Plan(CaseSource(read_cases(data).rows[:4], "x"), out, config))
    episodes = {episode.case_id: episode for episode in EpisodeStore(out / "filter").read()}
    split = [*exports.read_trl(out / "export")]
    if dialect == "ibis":
        split += exports.read_trl(out / "export", "val")
    assert {conversation.id for conversation in split} == set(episodes)
    for conversation in split:
        episode = episodes[conversation.id]
        target = next(iter(episode.masks), "")
        read = [parse(text, episode.size, dialect=dialect, default_target=target) for text in replies_of(conversation)]
        wanted = [turn.reply for turn in episode.turns]
        if dialect == "released":  # it has no names: the mask's one stands for them
            assert [[type(a) for a in reply.actions] for reply in read] == [
                [type(a) for a in w.actions] for w in wanted
            ]
        else:
            assert read == wanted
        wrong = episode.undone_turns
        assert learned_of(conversation) == [number not in wrong for number in range(len(episode.turns))]
        assert len(conversation.images) == len(episode.turns)
        assert all(path.is_file() for path in conversation.images)


def test_images_show_the_masks_of_their_turn(made: Path) -> None:
    from ibisagent.imaging.images import read_image
    from ibisagent.protocol import overlay

    episodes = {episode.case_id: episode for episode in EpisodeStore(made / "filter").read()}
    conversation = max(exports.read_trl(made / "export"), key=lambda c: len(c.images))
    episode = episodes[conversation.id]
    image = read_image(episode.image_source)
    for turn, path in zip(episode.turns, conversation.images, strict=True):
        assert np.array_equal(np.asarray(PillowImage.open(path)), np.asarray(overlay(image, turn.before)))


def sharegpt(made: Path, name: str) -> Iterator[tuple[str, list[Reply], Episode]]:
    """The records of a set: id, replies as they are read, and the episode that they come from."""
    episodes = {episode.case_id: episode for episode in EpisodeStore(made / "filter").read()}
    for path in sorted((made / "export" / "sharegpt" / f"{name}-train").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            episode = episodes[record["id"].partition("@")[0]]
            said = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
            assert sum(one["content"].count("<image>") for one in record["messages"]) == len(record["images"])
            yield record["id"], [parse(text, episode.size, dialect="ibis") for text in said], episode


def test_sharegpt_comes_back_and_never_teaches_a_mistake(made: Path) -> None:
    for _, replies, episode in sharegpt(made, "all"):
        assert replies == [turn.reply for turn in episode.turns]
        assert not episode.undone_turns
    learned: Counter[str] = Counter()
    turns: dict[str, int] = {}
    for name, replies, episode in sharegpt(made, "last"):
        number = int(name.partition("@")[2])
        assert number not in episode.undone_turns
        assert replies == [turn.reply for turn in episode.turns[: number + 1]]
        learned[episode.case_id] += 1
        turns[episode.case_id] = len(episode.turns)
    assert learned
    assert all(count == turns[name] - 1 for name, count in learned.items())
    info = json.loads((made / "export" / "dataset_info.json").read_bytes())
    assert all((made / "export" / entry["file_name"]).is_dir() for entry in info.values())


def test_prompts_carry_the_ground_truth_that_rewards_need(data: Path, made: Path) -> None:
    from ibisagent.imaging.masks import decode_rle

    cases = read_cases(data).by_id
    questions = {question.id: question for question in all_questions(data, made)}
    records = {record["id"]: record for record in exports.read_grpo(made / "export")}
    assert set(records) == {q.id for q in questions.values() if q.split == "train"}
    for name, record in records.items():
        question = questions[name]
        assert [mask["name"] for mask in record["targets"]] == question.targets
        for row, mask in zip(question.rows, record["targets"], strict=False):
            assert np.array_equal(decode_rle(mask), cases[row].targets[mask["name"]])  # type: ignore[index]
        assert bool(record["start"]) is question.start
        assert record["answer"] == (question.answer or None)
        assert len(record["images"]) == 1
    verl = [one for path in sorted((made / "export" / "verl").glob("train-*")) for one in read_table(path).to_pylist()]
    assert [record["extra_info"]["id"] for record in verl] == list(records)
    for record in verl:
        same = records[record["extra_info"]["id"]]
        ground_truth = json.loads(record["reward_model"]["ground_truth"])
        assert {key: same[key] for key in ground_truth} == ground_truth
        assert sum(said["content"].count("<image>") for said in record["prompt"]) == len(record["images"]) == 1


def test_masked_turns_carry_no_loss_on_token_labels(made: Path) -> None:
    """With the shipped template, tokens that are learned spell the right replies, and nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, clean_up_tokenization_spaces=False)
    conversations = list(exports.read_trl(made / "export"))
    self_correcting = [conversation for conversation in conversations if not all(learned_of(conversation))]
    assert self_correcting
    for conversation in [*self_correcting[:3], *conversations[:3]]:
        encoded = tokenizer.apply_chat_template(
            conversation.messages,
            chat_template=exports.TRAINING_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learned = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
        right = [
            text for text, learns in zip(replies_of(conversation), learned_of(conversation), strict=True) if learns
        ]
        assert tokenizer.decode(learned) == "".join(f"{text}<|im_end|>" for text in right)


def test_what_is_kept_stops_on_its_own(made: Path) -> None:
    for episode in EpisodeStore(made / "filter").read():
        assert isinstance(episode.turns[-1].reply.actions[-1], Stop)
        assert all(turn.reply.thought for turn in episode.turns)


def test_ray_gives_the_same_bytes(data: Path, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    code = (
        "import sys; from pathlib import Path; from ibisagent.datasets import read_cases;"
        "from ibisagent.generation.config import FactoryConfig; from ibisagent.generation.stages import Plan, build;"
        "from ibisagent.generation.on_ray import on_ray;"
        f"build(Plan(read_cases({str(data)!r}), Path(sys.argv[1]), FactoryConfig.model_validate_json(sys.argv[2])),"
        "run_shards=on_ray(2))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), CONFIG.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "out") == contents(made)


def test_images_are_checked_by_size(made: Path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        next(exports.read_trl(made / "export", "nowhere"))
    assert Image(np.zeros((3, 4, 3), np.uint8)).size == (3, 4)


def test_the_command_and_its_recipe(data: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "data.toml"
    assert FactoryConfig.read(recipe) == FactoryConfig()
    (tmp_path / "own.toml").write_text('segmenter = "region"\nshard_images = 3\nformats = ["grpo"]\n')
    given = ["data", "build", str(data), "-o", str(tmp_path / "out"), "-c", str(tmp_path / "own.toml"), "--limit", "4"]
    done = ibisagent(*given, "--stage", "trajectories", "--stage", "questions", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pairs"] == 4
    assert not (tmp_path / "out" / "thoughts").exists()
    assert json.loads(ibisagent(*given, "--dry-run").stdout)["price"] == 0
    assert "# Data card" in ibisagent(*given).stdout
    assert [path.name for path in (tmp_path / "out" / "export").iterdir() if path.is_dir()].count("trl") == 0
    part = ["data", "build", str(data), "-o", str(tmp_path / "part"), "--dry-run", "--split"]
    assert ibisagent(*part, "val").exit_code == 0
    assert "no row has split 'test'" in " ".join(ibisagent(*part, "test").output.split())
    unlicensed = ibisagent(*part, "train", "--licence-class", "ok")
    assert "no row has licence_class 'ok'" in " ".join(unlicensed.output.split())
    wrong = ibisagent(*given, "--stage", "dreams")
    assert wrong.exit_code == 2
    assert "unknown stage 'dreams'" in wrong.output
