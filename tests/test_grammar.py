"""What a small model may write: whatever it chooses, the protocol reads it; and all that it was taught is among it."""

import numpy as np
import pytest

from ibisagent.domain import Box, Click, Reply, Stop, Undo
from ibisagent.policies.grammar import Grammar
from ibisagent.policies.nano_input import LOCATIONS, snap_locations
from ibisagent.protocol import parse, write
from ibisagent.training.nano.trainer import build_processor

LONGEST = 192


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor(["left lung", "optic disc"]).tokenizer


@pytest.fixture(scope="module")
def words(tokenizer):
    return len(tokenizer) - LOCATIONS**2


@pytest.fixture(scope="module")
def grammar(tokenizer, words):
    return Grammar([tokenizer.decode([number]) for number in range(words)], LOCATIONS, LONGEST)


def begun(tokenizer, text):
    return tokenizer("<|user|>Segment the lung.<|assistant|>" + snap_locations(text))["input_ids"]


def allowed_after(tokenizer, grammar, text):
    return grammar.allowed(grammar.end_of(begun(tokenizer, text)))


@pytest.mark.parametrize("hurry", [0.0, 0.1, 0.5], ids=["rambling", "talkative", "short"])
def test_whatever_is_drawn_is_readable(tokenizer, grammar, words, hurry):
    """Of tokens drawn evenly: long names, many actions, thoughts without end, tags in plain letters."""
    rng = np.random.default_rng(7)
    marks = {number for number in range(words) if set("<;") & set(tokenizer.decode([number]))}
    for _ in range(60):
        ids = begun(tokenizer, "")
        start = len(ids)
        while ids[-1] != tokenizer.eos_token_id:
            choices = np.flatnonzero(grammar.allowed(grammar.end_of(ids))).tolist()
            few = [token for token in choices if token in marks]
            ids.append(int(rng.choice(few if few and rng.random() < hurry else choices)))
            assert len(ids) - start <= LONGEST
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        for size in ((384, 384), (5, 7), (1000, 300)):
            assert parse(text, size, dialect="ibis", default_target="lung").problem is None, text


@pytest.mark.parametrize(
    "reply",
    [
        Reply("I look for it.", (Click(40, 30, True, ""), Box(3, 4, 80, 60, ""))),
        Reply("", (Click(40, 30, False, "left lung"), Undo(3), Click(1, 2, True, "optic disc"), Undo(1))),
        Reply("A; B", (Box(3, 4, 80, 60, "disc"),)),
        Reply("It fits.", (Stop("The left lung is segmented."),)),
        Reply("Not here.", (Click(40, 30, True, "disc"), Stop("Done; it fits.", ("left lung", "spleen")))),
    ],
)
def test_whatever_the_protocol_writes_may_be_written(tokenizer, grammar, reply):
    text = write(reply, (120, 160), dialect="ibis")
    ids = [*begun(tokenizer, text), tokenizer.eos_token_id]
    start = len(begun(tokenizer, ""))
    positions = list(grammar.walk(ids))
    assert all(grammar.allowed(positions[place - 1])[ids[place]] for place in range(start, len(ids)))
    assert grammar.allowed(positions[-1]).all()  # the reply is over


@pytest.mark.parametrize("begin", ["click +", "click -", "<think>It leaked.</think><action>undo; click -"])
def test_a_place_is_written_where_one_is_due(tokenizer, grammar, words, begin):
    text = begin if begin.startswith("<") else f"<action>{begin}"
    allowed = allowed_after(tokenizer, grammar, text + " (0.5, 0.5)")
    assert not allowed[words:].any()
    due = grammar.allowed(grammar.end_of(begun(tokenizer, text + " (0.5, 0.5)")[:-1]))
    assert due[words:].all()
    assert not due[:words].any()


def test_the_second_corner_of_a_box_lies_beyond_the_first(tokenizer, grammar, words):
    box = begun(tokenizer, "<action>click + (0.1, 0.9); box (0.477, 0.320) (0.6, 0.7)")
    first, second = (grammar.allowed(grammar.end_of(box[:last])) for last in (-3, -1))
    assert not first[:words].any()
    assert not second[:words].any()
    first, second = (one[words:].reshape(LOCATIONS, LOCATIONS) for one in (first, second))
    assert first[:-1, :-1].all()
    assert first.sum() == (LOCATIONS - 1) ** 2
    assert second[21:, 31:].all()
    assert second.sum() == (LOCATIONS - 21) * (LOCATIONS - 31)


def test_outside_replies_anything_may_come(tokenizer, grammar):
    ids = tokenizer("<|user|>click + now")["input_ids"]
    assert grammar.allowed(grammar.end_of(ids)).all()
    assert grammar.allowed(grammar.end_of([])).all()
    assert not allowed_after(tokenizer, grammar, "").all()
