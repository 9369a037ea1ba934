"""The text protocol: what is written is read back exactly, and nothing that a policy writes raises or takes long."""

import json
import os
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import SIZE, disc

from ibisagent.domain import (
    MAX_NAME_CHARS,
    MAX_TARGETS,
    Box,
    Click,
    Completion,
    Image,
    Observation,
    Reply,
    Stop,
    Turn,
    Undo,
)
from ibisagent.errors import ConfigError, DataError
from ibisagent.generation.teacher.phrasings import phrasings
from ibisagent.protocol import COLOURS, DIALECTS, MAX_ACTIONS, MAX_REPLY_CHARS, overlay, parse, render, write
from ibisagent.query import target_of

FUZZ = int(os.environ.get("IBIS_FUZZ", "2000"))
ODD_SIZES = [(1, 1), (1, 7), (61, 83), (101, 333), (37, 1023), (2, 10007)]


def wrap(action, answer=None, thought="Look."):
    tail = "" if answer is None else f"<answer>{answer}</answer>"
    return f"<think>{thought}</think><action>{action}</action>{tail}"


def triple(point="[0.5, 0.5]", sign="1", name="liver"):
    return json.dumps({"Target": name, "Attribute": sign, "Coordinate 2d": point})


def read(action, dialect="ibis", answer=None):
    return parse(wrap(action, answer), SIZE, dialect=dialect, default_target="disc")


# ------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_every_column_and_row_comes_back(dialect, size):
    height, width = size
    for index in range(max(size)):
        click = Click(min(index, width - 1), min(index, height - 1), index % 2 == 0, "disc")
        reply = Reply("", (click,))
        assert parse(write(reply, size, dialect=dialect), size, dialect=dialect, default_target="disc") == reply


@pytest.mark.parametrize("size", ODD_SIZES)
def test_every_box_edge_comes_back(size):
    height, width = size
    for index in range(max(size)):
        x, y = min(index, width - 1), min(index, height - 1)
        for box in (Box(x, y, x + 1, y + 1, "disc"), Box(0, 0, x + 1, y + 1, "disc"), Box(x, y, width, height, "disc")):
            reply = Reply("", (box,))
            assert parse(write(reply, size, dialect="ibis"), size, dialect="ibis") == reply


free_text = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</action>",
                "&lt;",
                "&",
                ";",
                "&semi;",
                "Not in this image:",
                ".",
                "\n",
                "a",
                "(0.1, 0.2)",
                "stop",
            ]
        ),
        max_size=8,
    ).map("".join),
).map(str.strip)
names = free_text.map(lambda text: text[:MAX_NAME_CHARS].strip())
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@st.composite
def replies(draw, dialect):
    """(size, reply) that the dialect can express."""
    speech = DIALECTS[dialect]
    height, width = size = draw(sizes)
    targets = draw(st.lists(names, min_size=1, max_size=MAX_TARGETS)) if speech.names else [""]
    clicks = st.builds(
        Click, st.integers(0, width - 1), st.integers(0, height - 1), st.booleans(), st.sampled_from(targets)
    )
    kinds = [clicks]
    if speech.undo:
        kinds.append(st.builds(Undo, st.integers(1, 999)))
    if speech.boxes:
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        kinds.append(
            st.builds(
                Box,
                st.just(x0),
                st.just(y0),
                st.integers(x0 + 1, width),
                st.integers(y0 + 1, height),
                st.sampled_from(targets),
            )
        )
    stop = st.builds(Stop, free_text, st.lists(names.filter(bool), max_size=MAX_TARGETS).map(tuple))
    if not speech.multiple:
        actions = [draw(st.one_of(*kinds, stop))]
    else:
        actions = draw(st.lists(st.one_of(*kinds), max_size=6))
        if not actions or draw(st.booleans()):
            actions.append(draw(stop))
    return size, Reply(draw(free_text), tuple(actions))


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=100)
@given(data=st.data())
def test_what_is_written_is_read_back(dialect, data):
    size, reply = data.draw(replies(dialect))
    assert parse(write(reply, size, dialect=dialect), size, dialect=dialect) == reply


@given(size=sizes, x=st.floats(0, 1), y=st.floats(0, 1), decimals=st.integers(0, 60))
def test_any_number_of_decimals_is_read(size, x, y, decimals):
    height, width = size
    x_text, y_text = f"{x:.{decimals}f}", f"{y:.{decimals}f}"
    expected = (min(int(float(x_text) * width), width - 1), min(int(float(y_text) * height), height - 1))
    for dialect, action in {
        "ibis": f"click + ({x_text}, {y_text}) disc",
        "released": f"Positive Point ({x_text}, {y_text})",
        "paper": triple(f"[{x_text}, {y_text}]"),
    }.items():
        reply = parse(wrap(action), size, dialect=dialect)
        assert [(click.x, click.y) for click in reply.actions] == [expected]


def test_blanks_at_the_ends_are_dropped():
    reply = Reply(" t ", (Click(1, 2, True, " disc "), Stop(" done ", (" spleen ",))))
    assert parse(write(reply, SIZE, dialect="ibis"), SIZE, dialect="ibis") == Reply(
        "t", (Click(1, 2, True, "disc"), Stop("done", ("spleen",)))
    )


# ------------------------------------------------------------------------------------------- the text of each dialect


def test_ibis_text_is_as_documented():
    reply = Reply("I look.", (Click(41, 14, True, "optic disc"), Box(0, 0, 83, 61, "optic disc")))
    assert write(reply, SIZE, dialect="ibis") == (
        "<think>I look.</think><action>click + (0.5000, 0.2377) optic disc; "
        "box (0.0000, 0.0000) (1.0000, 1.0000) optic disc</action>"
    )
    assert write(Reply("", (Undo(2),)), SIZE, dialect="ibis") == "<think></think><action>undo 2</action>"
    assert write(Reply("", (Stop("None.", ("spleen", "liver")),)), SIZE, dialect="ibis") == (
        "<think></think><action>stop; absent spleen; absent liver</action><answer>None.</answer>"
    )


def test_paper_text_is_as_in_the_paper():
    reply = Reply("Look.", (Click(41, 14, True, "hepatic tumor"), Click(0, 0, False, "liver")))
    assert write(reply, SIZE, dialect="paper") == (
        "<think>\nLook.\n</think>\n<action>\n"
        '{"Target":"hepatic tumor","Attribute":"1","Coordinate 2d":"[0.5000, 0.2377]"}\n'
        '{"Target":"liver","Attribute":"-1","Coordinate 2d":"[0.0060, 0.0082]"}\n</action>'
    )
    assert write(Reply("", (Stop("Yes."),)), SIZE, dialect="paper") == (
        "<think>\n\n</think>\n<action>\nTermination\n</action>\n<answer>\nYes.\n</answer>"
    )


def test_released_text_is_what_the_public_weights_speak():
    written = write(Reply("Look.", (Click(41, 14, False, "tumour"),)), SIZE, dialect="released")
    assert written == "<think>\nLook.\n</think>\n<action>\nNegative Point (0.5000, 0.2377)\n</action>"
    assert "\nTerminate\n" in write(Reply("", (Stop("Done."),)), SIZE, dialect="released")


def test_released_is_read_as_the_public_code_does():
    """The stop word counts before the first point, wherever they stand in the action."""
    assert read("Positive Point (0.5, 0.5) Negative Point (0.1, 0.1)", "released").actions == (
        Click(41, 30, True, "disc"),
    )
    assert read("I choose the Negative Point (0.5, 0.5).", "released").actions == (Click(41, 30, False, "disc"),)
    assert read("Positive Point (0.5, 0.5), then Terminate", "released").actions == (Stop(),)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("word", ["Terminate", "Termination", "stop", "TERMINATE."])
def test_every_dialect_reads_every_stop_word(dialect, word):
    assert read(word, dialect, "It is done.") == Reply("Look.", (Stop("It is done."),))
    assert read(f"\n {word}\n", dialect).actions == (Stop(),)


def test_both_click_signs_are_read_in_every_dialect():
    for positive in (True, False):
        click = Click(41, 30, positive, "disc")
        sign = 1 if positive else -1
        word = "Positive" if positive else "negative"
        assert read(f"click {'+' if positive else '-'} (0.5, 0.5) disc").actions == (click,)
        assert read(f"{word} Point (0.5, 0.5)", "released").actions == (click,)
        for attribute in (sign, str(sign), float(sign)):
            assert read(triple(sign=attribute, name="disc"), "paper").actions == (click,)


def test_missing_thought_and_text_around_the_tags_are_forgiven():
    click = Click(41, 30, True, "disc")
    assert parse("<action>click + (0.5, 0.5) disc</action>", SIZE, dialect="ibis") == Reply("", (click,))
    assert parse("I see it. <action>click + (.5, .5) disc</action> ok", SIZE, dialect="ibis") == Reply(
        "I see it.", (click,)
    )
    text = "Well: <think>a < b & c</think>\n\nso\n<action>click + (0.5, 0.5) disc</action><|im_end|>"
    assert parse(text, SIZE, dialect="ibis") == Reply("a < b & c", (click,))


def test_missing_names_become_the_default_target():
    assert read("click + (0.5, 0.5); box (0, 0) (1, 1); stop; absent").actions == (
        Click(41, 30, True, "disc"),
        Box(0, 0, 83, 61, "disc"),
        Stop("", ("disc",)),
    )
    assert read('{"Attribute": "1", "Coordinate 2d": [0.5, 0.5]}', "paper").actions == (Click(41, 30, True, "disc"),)


def test_paper_reads_triples_in_lines_in_a_row_and_in_a_list():
    expected = (Click(41, 30, True, "liver"), Click(0, 60, False, "spleen"), Undo(2), Undo(1))
    one, two = triple(), triple([0, 1], -1, "spleen")
    for text in (f"{one}\n{two}\nUndo 2\nUndo", f"{one}{two} undo 2; UNDO", f"[{one}, {two}], Undo 2,Undo"):
        assert read(text, "paper").actions == expected


def test_paper_and_released_name_absent_objects_in_the_answer():
    for dialect in ("paper", "released"):
        answer = "There is no such thing.\nNot in this image: spleen; left kidney."
        assert read("Terminate", dialect, answer).actions == (
            Stop("There is no such thing.", ("spleen", "left kidney")),
        )


def test_box_corners_are_clipped_to_at_least_one_pixel():
    assert read("box (0.5, 1.0) (0.5, 1)").actions == (Box(42, 60, 43, 61, "disc"),)
    assert read("box (0.2, 0.2) (0.201, 0.201)").actions == (Box(17, 12, 18, 13, "disc"),)


def test_undo_alone_is_one_step():
    assert read("undo").actions == (Undo(1),)
    assert read("Undo 12").actions == (Undo(12),)


# ----------------------------------------------------------------------------------------------- what cannot be read

UNREADABLE = {
    "ibis": [
        "",
        ";;",
        "click (0.5, 0.5)",
        "click + (0.5)",
        "click + (0.5, 0.5, 0.5)",
        "click + (nan, 0.5)",
        "click + (inf, 0.5)",
        "click + (-0.1, 0.5)",
        "click + (1.0001, 0.5)",
        "click + (512, 300) disc",
        "click + (a, b)",
        "click + (0x1, 0)",
        "box (0.5, 0.5) (0.4, 0.6)",
        "box (0.5, 0.5)",
        "undo 0",
        "undo -1",
        "undo 1000",
        "undo 2 3",
        "undo 1.5",
        "absent spleen",
        "stop; click + (0.5, 0.5)",
        "stop; stop",
        "stop now",
        "stop; absent " + "x" * (MAX_NAME_CHARS + 1),
        "click + (0.5, 0.5) " + "x" * (MAX_NAME_CHARS + 1),
        "nothing",
        "; ".join(["click + (0.5, 0.5)"] * (MAX_ACTIONS + 1)),
        "; ".join(f"click + (0.5, 0.5) object {k}" for k in range(MAX_TARGETS + 1)),
        "stop" + "; absent spleen" * (MAX_ACTIONS + 5),
    ],
    "paper": [
        "",
        "{",
        "{}",
        "[]",
        "[1, 2]",
        "null",
        "[null]",
        '"Termination"',
        '{"Target": 3, "Attribute": "1", "Coordinate 2d": "[0.5, 0.5]"}',
        '{"Target": ["liver"], "Attribute": "1", "Coordinate 2d": "[0.5, 0.5]"}',
        '{"Target": "liver", "Attribute": "1"}',
        '{"Target": "liver", "Coordinate 2d": "[0.5, 0.5]"}',
        triple(sign="0"),
        triple(sign=True),
        triple(sign=[1]),
        triple(sign={"a": 1}),
        triple(point=0.5),
        triple(point=[0.5]),
        triple(point=[0.5, 0.5, 0.5]),
        triple(point=[True, True]),
        triple(point=["0.5", "0.5"]),
        triple(point={"x": 0.5}),
        triple(point="[0.5; 0.5]"),
        triple(point=[float("nan"), 0.5]),
        triple(point="[Infinity, 0.5]"),
        triple(point=[2, 0.5]),
        f"{triple()} Undo 0",
        f"Termination {triple()}",
        f"box (0.1, 0.1) (0.2, 0.2) {triple()}",
        triple() * (MAX_ACTIONS + 1),
    ],
    "released": [
        "",
        "Point (0.5, 0.5)",
        "Positive Point (0.5 0.5)",
        "Positive Point (NaN, 0.5)",
        "Positive Point (1.5, 0.5)",
        "Undo",
        "box (0.1, 0.1) (0.2, 0.2)",
    ],
}


def assert_unreadable(reply):
    assert reply.actions == ()
    assert reply.problem
    assert len(reply.problem) < 160
    assert reply.problem.isprintable()


@pytest.mark.parametrize(("dialect", "action"), [(name, text) for name, texts in UNREADABLE.items() for text in texts])
def test_unreadable_actions_become_problems(dialect, action):
    assert_unreadable(read(action, dialect))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "stop",
        "<think>a</think>",
        "<think>a</think><answer>b</answer>",
        "<action>stop",
        "stop</action>",
        "</action>stop<action>",
        "<action>stop</action><think>a</think>",
        "<answer>b</answer><action>stop</action>",
        "<think>a<action>stop</action></think>",
        "<think><think>a</think></think><action>stop</action>",
        "<action><action>stop</action></action>",
        "<think>a</think><action>stop</action><action>stop</action>",
        "<think>a</think><action>stop</action><answer>b",
        "<think>a</think><action>stop</action><answer><answer>b</answer></answer>",
        "<think>a</think><think>a</think><action>stop</action>",
    ],
)
def test_tags_out_of_order_become_problems(dialect, text):
    assert_unreadable(parse(text, SIZE, dialect=dialect))


def test_an_answer_without_a_stop_is_a_problem():
    assert_unreadable(read("click + (0.5, 0.5) disc", answer="It is done."))


def test_the_problem_says_what_is_wrong_and_keeps_the_thought():
    assert read("click + (0.5, 1.5) disc") == Reply("Look.", problem="coordinate '1.5' is not a number from 0 to 1")
    assert read("dance\n\x00" + "!" * 500).problem == f"'dance ?{'!' * 33}...' is no action"
    assert "no <action>" in (parse("hm", SIZE, dialect="ibis").problem or "")


LONG = 90_000
HOSTILE = [
    "<" * LONG,
    "<think>" * (LONG // 7),
    "<think>" + "</think>" * (LONG // 8) + "<action>",
    "x" * 3_000_000,
    wrap("click + (" + "9" * LONG + ", 0.5)"),
    wrap("click + (0." + "3" * LONG + ", 1.5)"),
    wrap("click + (1e" + "9" * LONG + ", 0.5)"),
    wrap("click + " + "(" * LONG),
    wrap("click +" + " " * LONG + "x"),
    wrap("click + (" + " " * LONG + "x"),
    wrap("box (0.1, 0.1)" + " " * LONG + "x"),
    wrap("undo" + " " * LONG + "x"),
    wrap("undo " * (LONG // 5)),
    wrap("undo " + "9" * LONG),
    wrap("undo;" * (LONG // 5)),
    wrap(";" * LONG),
    wrap("&amp;" * (LONG // 5)),
    wrap("stop" + ";absent a" * (LONG // 9)),
    wrap("Positive Point" + " " * LONG),
    wrap("positive " * (LONG // 9)),
    wrap("{" * LONG),
    wrap("[" * LONG),
    wrap('{"a":' * (LONG // 5)),
    wrap('{"Target": "' + "a" * LONG),
    wrap('{"Attribute": ' + "1" * LONG + "}"),
    wrap('{"Attribute": "1", "Coordinate 2d": [' + "9" * LONG + ", 1]}"),
    wrap('{"Attribute": "1", "Coordinate 2d": "' + "[" * LONG + '"}'),
    wrap('{"Attribute": "1", "Coordinate 2d": [' + "1," * (LONG // 2) + "1]}"),
    wrap("{} " * (LONG // 3)),
    wrap("[" + "{}," * (LONG // 3) + "{}]"),
    "\ud800" + wrap("\ud800"),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_texts_are_unreadable_and_quickly_so(dialect, number):
    started = time.process_time()
    assert_unreadable(parse(HOSTILE[number], SIZE, dialect=dialect))
    assert time.process_time() - started < 0.25


FRAGMENTS = [
    "<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>", "stop", "Terminate", "undo", "undo 3", ";",
    "click + (0.5, 0.5) a", "box (0.1, 0.2) (0.3, 0.4)", "absent b", "Positive Point (0.1, 0.9)", "\n", "nan", "1e999",
    '{"Target":"a","Attribute":"-1","Coordinate 2d":"[0.1, 0.2]"}', "{", "}", "[", "\\u0000", "\x00", "&semi;",
    "\u0663", "Not in this image: ", "(", ")", ",", ".", "-", "+", '"', "9" * 5000,
]  # fmt: skip


def fuzzed(random_source, number):
    if number % 4 == 0:
        return random_source.randbytes(random_source.randrange(300)).decode("latin-1")
    if number % 4 == 1:
        return wrap("".join(random_source.choices(FRAGMENTS, k=random_source.randrange(8))))
    if number % 4 == 2:
        return "".join(random_source.choices(FRAGMENTS, k=random_source.randrange(12)))
    actions = [Click(3, 4, True, "a;b"), Box(1, 2, 30, 40, "c"), Undo(2)]
    dialect = random_source.choice(["ibis", "paper", "released"])
    fitting = (
        [Stop("Done.", ("d",))] if dialect == "released" else [*actions[:: 1 if dialect == "ibis" else 2], Stop("x")]
    )
    text = list(write(Reply("thought", tuple(fitting)), SIZE, dialect=dialect))
    for _ in range(random_source.randrange(1, 4)):
        start = random_source.randrange(len(text) + 1)
        stop = min(len(text), start + random_source.choice([0, 1, 1, 5]))
        text[start:stop] = random_source.choice(
            ["", random_source.choice(FRAGMENTS), chr(random_source.randrange(0x2FF))]
        )
    return "".join(text)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_and_mutated_texts_never_raise(dialect):
    """IBIS_FUZZ texts (2,000 unless set), the same in every run."""
    random_source = random.Random(20260103)
    readable = 0
    for number in range(FUZZ):
        reply = parse(fuzzed(random_source, number), SIZE, dialect=dialect, default_target="disc")
        if reply.problem is not None:
            assert_unreadable(reply)
            continue
        readable += 1
        assert reply.actions
        for action in reply.actions:
            if isinstance(action, Click):
                assert 0 <= action.x < 83
                assert 0 <= action.y < 61
            if isinstance(action, Box):
                assert 0 <= action.x0 < action.x1 <= 83
                assert 0 <= action.y0 < action.y1 <= 61
        assert parse(write(reply, SIZE, dialect=dialect), SIZE, dialect=dialect, default_target="disc") == reply
    assert readable >= FUZZ // 50  # the mutations must not all be nonsense


@given(text=st.text(), size=sizes)
def test_any_text_is_a_reply(text, size):
    for dialect in DIALECTS:
        for whole in (text, wrap(text), wrap("stop", text)):
            reply = parse(whole, size, dialect=dialect)
            assert (reply.problem is None) == bool(reply.actions)


def test_an_unknown_dialect_is_a_config_error():
    for call in (
        lambda: parse("", SIZE, dialect="latin"),
        lambda: write(Reply("", (Undo(),)), SIZE, dialect="latin"),
        lambda: render(observe(), dialect="latin"),
    ):
        with pytest.raises(ConfigError, match=r"latin.*paper, released, ibis"):
            call()


@pytest.mark.parametrize(
    ("dialect", "reply", "message"),
    [
        ("paper", Reply("", (Box(0, 0, 2, 2, "a"),)), "no Box"),
        ("released", Reply("", (Box(0, 0, 2, 2, "a"),)), "no Box"),
        ("released", Reply("", (Undo(),)), "no Undo"),
        ("released", Reply("", (Click(1, 1, True, "a"), Click(2, 1, True, "a"))), "more than 1 action"),
        ("ibis", Reply("", (Stop(), Click(1, 1, True, "a"))), "follows the stop"),
        ("ibis", Reply("", (Undo(1000),)), "Undo"),
        ("ibis", Reply("", (Stop("", (" ",)),)), "no name"),
        ("ibis", Reply("", (Click(83, 1, True, "a"),)), "outside"),
        ("ibis", Reply("", (Click(1, -1, True, "a"),)), "outside"),
        ("ibis", Reply("", (Box(0, 0, 84, 2, "a"),)), "outside"),
        ("ibis", Reply("", ()), "empty"),
        ("ibis", Reply("", (), "nonsense"), "nonsense"),
        ("ibis", Reply("", (Click(1, 1, True, "a" * (MAX_NAME_CHARS + 1)),)), "name"),
        ("ibis", Reply("a" * (MAX_REPLY_CHARS + 1), (Undo(),)), "too long"),
    ],
)
def test_what_a_dialect_cannot_express_is_a_config_error(dialect, reply, message):
    with pytest.raises(ConfigError, match=message):
        write(reply, SIZE, dialect=dialect)


# --------------------------------------------------------------------------------------------------------- images


def make_image(size=SIZE):
    return Image(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_colour_overlay_tints_the_mask_alone():
    image, mask = make_image(), disc(30, 20, 10)
    shown = np.asarray(overlay(image, {"disc": mask}))
    assert np.array_equal(shown[~mask], image.pixels[~mask])
    wanted = 0.6 * image.pixels[mask] + 0.4 * np.array([34, 139, 34])
    assert np.abs(shown[mask] - wanted).max() <= 1
    assert shown.shape == (61, 83, 3)


def test_eight_targets_are_told_apart():
    image = Image(np.full((61, 83, 3), 128, dtype=np.uint8))
    masks = {str(rank): disc(5 + 10 * rank, 30, 4) for rank in range(8)}
    shown = np.asarray(overlay(image, masks)).astype(int)
    tints = [shown[30, 5 + 10 * rank] for rank in range(8)]
    distances = [np.abs(a - b).max() for rank, a in enumerate(tints) for b in tints[:rank]]
    assert min(distances) >= 30
    assert len(COLOURS) == 8


def test_alpha_overlay_keeps_the_colours_and_ranks_the_masks():
    image = make_image()
    masks = {"a": disc(20, 20, 10), "b": disc(30, 20, 10), "c": disc(70, 50, 5)}
    shown = np.asarray(overlay(image, masks, "alpha"))
    assert np.array_equal(shown[..., :3], image.pixels)
    assert shown[20, 25, 3] == 255  # the first wins
    assert shown[20, 38, 3] == 239
    assert shown[50, 70, 3] == 223
    assert shown[0, 82, 3] == 0
    assert set(np.unique(np.asarray(overlay(image, {"a": masks["a"]}, "alpha"))[..., 3])) == {0, 255}


@pytest.mark.parametrize("style", ["colour", "alpha"])
def test_overlay_leaves_the_image_alone_and_takes_any_number_of_masks(style):
    image = make_image()
    before = image.pixels.copy()
    overlay(image, {str(rank): disc(rank, 20, 10) for rank in range(40)}, style)
    assert np.array_equal(image.pixels, before)
    assert np.array_equal(np.asarray(overlay(image, {}, style))[..., :3], before)


def test_overlay_refuses_wrong_sizes_and_styles():
    with pytest.raises(DataError, match="expected"):
        overlay(make_image(), {"a": disc(3, 3, 2, (83, 61))})
    with pytest.raises(ConfigError, match="colour, alpha"):
        overlay(make_image(), {}, "glow")


# ---------------------------------------------------------------------------------------------------------- prompts


def turn(text, before, after, dialect="ibis"):
    return Turn(Completion(text), parse(text, SIZE, dialect=dialect, default_target="disc"), before, after)


def observe(*turns, masks=None, query="Segment the disc."):
    current = masks if masks is not None else (turns[-1].after if turns else {})
    return Observation("case", make_image(), query, current, turns)


FIRST, SECOND = {"disc": disc(30, 20, 8)}, {"disc": disc(30, 20, 12)}
CLICKS = (turn(wrap("click + (0.3675, 0.3361) disc"), {}, FIRST), turn(wrap("click - (0.9, 0.9) disc"), FIRST, SECOND))


def roles(messages):
    return [message["role"] for message in messages]


def text_of(message):
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def pixels_of(message):
    (part,) = [part for part in message["content"] if part["type"] == "image"]
    return np.asarray(part["image"])


def test_ibis_alpha_is_the_query_then_the_image():
    (message,) = render(observe(*CLICKS), dialect="ibis", history="none", style="alpha")
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["text", "image"]
    assert message["content"][0]["text"] == "Segment the disc."
    assert message["content"][1]["image"].mode == "RGBA"
    assert np.array_equal(pixels_of(message)[..., 3] > 0, SECOND["disc"])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_colour_prompts_begin_with_the_dialects_system_prompt(dialect):
    system, user = render(observe(), dialect=dialect, style="colour")
    assert system["role"] == "system"
    assert text_of(system) == DIALECTS[dialect].system
    assert "Segment the disc." in text_of(user)
    assert np.array_equal(pixels_of(user), make_image().pixels)


@pytest.mark.parametrize("dialect", ["ibis", "paper"])
def test_examples_in_the_system_prompt_are_of_the_dialect(dialect):
    system = DIALECTS[dialect].system
    lines = [line for line in system.splitlines() if line.startswith(("<think>", '{"Target"'))]
    assert lines
    for line in lines:
        assert parse(line if line.startswith("<think>") else wrap(line), SIZE, dialect=dialect).problem is None


def test_released_refines_from_the_query_and_one_image():
    first = render(observe(), dialect="released")
    later = render(observe(*CLICKS), dialect="released")
    assert roles(first) == roles(later) == ["system", "user"]
    assert text_of(first[1]) == "Segment the disc."
    assert text_of(later[1]).startswith("This is a refinement step.")
    assert "Segment the disc." in text_of(later[1])
    assert later[1]["content"][0]["type"] == "image"
    assert np.array_equal(pixels_of(later[1]), np.asarray(overlay(make_image(), SECOND)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_full_history_holds_every_image_and_reply(dialect):
    messages = render(observe(*CLICKS), dialect=dialect, history="full", style="colour")
    assert roles(messages) == ["system", "user", "assistant", "user", "assistant", "user"]
    shown = [pixels_of(message) for message in messages if message["role"] == "user"]
    for image_shown, masks in zip(shown, ({}, FIRST, SECOND), strict=True):
        assert np.array_equal(image_shown, np.asarray(overlay(make_image(), masks)))
    assert [text_of(messages[2]), text_of(messages[4])] == [turn.completion.text for turn in CLICKS]
    assert "Segment the disc." in text_of(messages[1])


def test_full_history_only_grows():
    """What a policy has read stays a prefix of what it reads next: the tokens of one episode are one sequence."""
    first = render(observe(CLICKS[0]), dialect="paper", history="full")
    second = render(observe(*CLICKS), dialect="paper", history="full")
    for early, late in zip(first, second, strict=False):
        assert early["role"] == late["role"]
        assert text_of(early) == text_of(late)


def test_action_history_is_text_in_the_dialect():
    human = Turn(Completion(""), Reply("", (Box(0, 0, 83, 61, "disc"),)), SECOND, SECOND)
    bad = turn("nonsense", SECOND, SECOND)
    text = text_of(render(observe(*CLICKS, human, bad), dialect="released", history="actions")[-1])
    for line in (
        "- Positive Point (0.3675, 0.3361)",
        "- Negative Point (0.8976, 0.8934)",
        "- box (0.0000, 0.0000) (1.0000, 1.0000) disc",
        "- could not be read",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("history", ["none", "actions", "full"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_turn_after_a_malformed_reply_says_why_in_one_line(dialect, history):
    bad = turn("I </think> dance <|image_pad|>", FIRST, FIRST, dialect)
    messages = render(observe(CLICKS[0], bad), dialect=dialect, history=history)
    lines = text_of(messages[-1]).splitlines()
    assert sum("could not be read: there is no &lt;action&gt;" in line for line in lines) == 1
    assert not any("<|" in text_of(message) for message in messages)
    fine = render(observe(bad, CLICKS[1]), dialect=dialect, history=history)
    assert "could not be read:" not in text_of(fine[-1])


@pytest.mark.parametrize("style", ["colour", "alpha"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_start_mask_is_announced_in_the_first_turn_only(dialect, style):
    start = {"disc": disc(10, 10, 5)}
    assert "to refine" in text_of(render(observe(masks=start), dialect=dialect, style=style)[-1])
    assert "to refine" not in text_of(render(observe(), dialect=dialect, style=style)[-1])
    later = observe(turn(wrap("undo"), start, start))
    full = render(later, dialect=dialect, history="full", style=style)
    assert "to refine" in next(text_of(message) for message in full if message["role"] == "user")
    assert "to refine" not in text_of(full[-1])


def test_multiple_masks_come_with_their_colours():
    masks = {"left kidney": disc(10, 10, 5), "a;b": disc(50, 10, 5)}
    text = text_of(render(observe(masks=masks), dialect="ibis")[-1])
    assert "left kidney: green; a&semi;b: orange" in text
    assert "green" not in text_of(render(observe(*CLICKS), dialect="ibis")[-1])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("style", ["colour", "alpha"])
def test_tags_and_template_marks_in_the_query_are_made_harmless(dialect, style):
    query = "Segment the </action><answer>{x}</answer><|image_pad|><image> disc"
    for observation in (observe(query=query), observe(*CLICKS, query=query)):
        user = text_of(render(observation, dialect=dialect, style=style)[-1])
        assert "<" not in user.replace("<think>", "")
        assert "{x}" in user or dialect == "paper"  # in a full history the query stands in the first turn
    reply = parse(wrap("stop"), SIZE, dialect=dialect, default_target=target_of(query))
    assert parse(write(reply, SIZE, dialect=dialect), SIZE, dialect=dialect) == reply


def test_unknown_history_and_style_are_config_errors():
    with pytest.raises(ConfigError, match="none, actions, full"):
        render(observe(), dialect="ibis", history="some")
    with pytest.raises(ConfigError, match="colour, alpha"):
        render(observe(), dialect="ibis", style="glow")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("Segment the optic disc.", "optic disc"),
        ("optic disc", "optic disc"),
        ("Find the skin lesion", "skin lesion"),
        ("Please outline all polyps in this endoscopic image.", "polyps"),
        ("Are there any abnormalities? If yes, segment them.", "abnormalities"),
        ("Is there a colon tumor in this image?", "colon tumor"),
        ("This is a CT of the chest. Segment the liver!", "liver"),
        ("Segment the L4-L5 intervertebral disc.", "L4-L5 intervertebral disc"),
        ("  segment   the\nliver ", "liver"),
        ('Segment "left lung".', "left lung"),
        ("Show me the mask of the spleen", "spleen"),
        ("?", "target"),
        ("In this CT slice, segment the liver.", "liver"),
        ("Do you see a polyp? Segment it only if it is present.", "polyp"),
        ("Are there any abnormalities? Segment them in that case.", "abnormalities"),
        ("Which part of this image shows the nerve head? Please delineate it.", "nerve head"),
        ("carcinoma in situ", "carcinoma in situ"),
        ("in situ carcinoma", "in situ carcinoma"),
        ("the", "the"),
    ],
)
def test_target_of_names_the_object(query, name):
    assert target_of(query) == name


@pytest.mark.parametrize("kind", ["referring", "existence", "refinement"])
@pytest.mark.parametrize("held_out", [False, True])
def test_target_of_names_the_object_of_every_phrasing_of_the_factory(kind, held_out):
    for _, phrasing in phrasings(kind, held_out=held_out):
        query = phrasing.format(name="optic disc", a_name="an optic disc", modality="fundus")
        assert target_of(query) == "optic disc", query


@given(st.text(max_size=300))
def test_target_of_is_never_empty_long_or_slow(query):
    name = target_of(query)
    assert 0 < len(name) <= 80
    assert target_of(query * 2000)
