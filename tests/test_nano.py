"""`ibis-nano` is a normal transformers model: built, saved, loaded, batched and decoded like any other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from transformers import AutoModelForImageTextToText, AutoProcessor

from ibisagent.domain import Click, Image, Observation
from ibisagent.errors import ConfigError
from ibisagent.policies import load_policy
from ibisagent.policies.nano import LikelyPlaces, corner_densities
from ibisagent.policies.nano_input import LOCATIONS, TOKENS_PER_IMAGE, location_text, snap_locations
from ibisagent.protocol import parse
from ibisagent.training.nano.trainer import build_model, build_processor

NAMES = ["bright disc", "left lung"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("nano")
    processor = build_processor(NAMES)
    build_model(processor).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def make_image(seed, shape=(61, 83), alpha=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)
    return PillowImage.fromarray(np.dstack([pixels, np.full(shape, alpha, np.uint8)]))


def test_every_location_is_one_token_at_the_end_of_the_vocabulary(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    text = "".join(location_text(column, row) for row in range(LOCATIONS) for column in range(LOCATIONS))
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(len(tokenizer) - LOCATIONS**2, len(tokenizer)))


@pytest.mark.parametrize("text", ["(0.5, 0.25)", "(0.508,0.258)", "( .50789 , 0.2500001 )"])
def test_coordinates_snap_to_their_cell(text):
    assert snap_locations(f"click + {text} disc") == f"click + {location_text(32, 16)} disc"


def test_a_snapped_location_is_read_as_a_pixel_of_its_cell():
    for column in (0, 31, LOCATIONS - 1):
        reply = parse(f"<action>click + {location_text(column, 5)}</action>", (128, 192), dialect="ibis")
        [click] = reply.actions
        assert isinstance(click, Click)
        assert click.x // 3 == column


def test_the_auto_classes_load_what_was_saved(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "IbisNanoForConditionalGeneration"
    batch = processor(text="<|user|>Find the disc.<image>", images=make_image(0), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 4, 256, 256)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == TOKENS_PER_IMAGE


def test_the_mask_and_the_query_change_the_reply_and_the_batch_does_not(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    features = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(1))

    def logits(texts, images):
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch, image_features=features.expand(len(texts), -1, -1, -1)).logits[:, -1]

    short, long = "<|user|>disc<image><|assistant|>", "<|user|>Segment the left lung, please.<image><|assistant|>"
    alone = logits([short], [make_image(0)])[0]
    assert not torch.allclose(alone, logits([short], [make_image(0, alpha=255)])[0], atol=1e-4)
    assert not torch.allclose(alone, logits([long], [make_image(0)])[0], atol=1e-4)
    together = logits([short, long], [make_image(0), make_image(0)])
    torch.testing.assert_close(together[0], alone, atol=2e-4, rtol=1e-3)


def two_pass(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, two_pass=True).eval()
    for layer in (model.vision.comparison.fine, model.vision.comparison.reply):
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(6))
    return model


def test_the_second_pass_sees_the_map_of_a_first_one_without_the_mask(folder):
    once, model = AutoModelForImageTextToText.from_pretrained(folder).eval(), two_pass(folder)
    text = "<|user|>disc<image><|assistant|>"
    batch = AutoProcessor.from_pretrained(folder)(
        text=[text] * 2, images=[make_image(0), make_image(0, alpha=255)], return_tensors="pt"
    )
    features = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    seen = []
    model.vision.comparison.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.inference_mode():
        first, second = (one(**batch, image_features=features) for one in (once, model))
        alone = model(**{name: of[1:] for name, of in batch.items()}, image_features=features[1:])
    assert not seen[0][0].any()
    torch.testing.assert_close(seen[0][1, 0], torch.ones(LOCATIONS, LOCATIONS))
    torch.testing.assert_close(seen[0][1, 1], first.region_logits[0].sigmoid())
    torch.testing.assert_close(second.logits[0], first.logits[0])  # no mask, nothing to compare
    assert not torch.allclose(second.logits[1], first.logits[1], atol=1e-2)
    torch.testing.assert_close(alone.logits[0], second.logits[1], atol=2e-4, rtol=1e-3)


def test_a_reply_begins_with_what_the_comparison_says_of_the_last_place(folder):
    model, once = two_pass(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        model.vision.comparison.fine.weight.zero_()
        model.vision.comparison.reply.weight[:, 4:].zero_()  # the whole image
    half = np.asarray(make_image(0)).copy()
    half[:, :40, 3] = 255
    images = [PillowImage.fromarray(half), PillowImage.fromarray(half), make_image(0), PillowImage.fromarray(half)]
    inside, outside = (f"click + {location_text(*place)}" for place in ((9, 9), (60, 9)))
    said = [f"{outside}; {inside}", outside, inside, ""]
    batch = AutoProcessor.from_pretrained(folder)(
        text=[f"<|user|>disc {one}<image><|assistant|>" for one in said],
        images=images,
        padding=True,
        return_tensors="pt",
    )
    features = torch.zeros(4, 128, 32, 32)
    with torch.inference_mode():
        first, second = (one(**batch, image_features=features).logits for one in (once, model))
    torch.testing.assert_close(second[:, -2], first[:, -2])  # not before the reply
    moved = (second - first)[:, -1].abs().amax(dim=1)
    assert min(moved[:2]) > 1e-2
    assert not torch.allclose((second - first)[0, -1], (second - first)[1, -1], atol=1e-2)
    torch.testing.assert_close(moved[2:], torch.zeros(2))  # no mask, or no place


def test_weights_that_are_to_learn_a_second_pass_act_as_before(folder):
    batch = AutoProcessor.from_pretrained(folder)(
        text="disc<image>", images=make_image(1, alpha=255), return_tensors="pt"
    )
    features = torch.zeros(1, 128, 32, 32)
    with torch.inference_mode():
        before, after = (
            AutoModelForImageTextToText.from_pretrained(folder, two_pass=twice)(**batch, image_features=features)
            for twice in (False, True)
        )
    torch.testing.assert_close(after.logits, before.logits)


@pytest.mark.parametrize("load", [AutoModelForImageTextToText.from_pretrained, two_pass])
def test_decoding_with_a_cache_equals_a_full_pass(folder, load):
    model = load(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor(text="<|user|>disc<image><|assistant|>", images=make_image(2, alpha=255), return_tensors="pt")
    features = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(2))
    steps = 6
    cached = model.generate(**batch, image_features=features, max_new_tokens=steps, min_new_tokens=steps)
    ids = batch["input_ids"]
    for _ in range(steps):
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=batch["pixel_values"],
                image_features=features,
            )
        scores = LikelyPlaces(model.word_count)(ids, output.logits[:, -1])
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(cached, ids)


def test_a_place_is_chosen_by_how_near_it_is_likely_to_be():
    words = 7
    shares = torch.zeros(3, words + LOCATIONS**2)
    shares[:, 2] = torch.tensor([0.05, 0.05, 0.7])  # the likeliest word
    maps = shares[:, words:].view(3, LOCATIONS, LOCATIONS)
    maps[:2, 40:45, 20:25] = 0.03  # each less than the word and than the lonely cell, all together more
    maps[:2, 3, 60] = 0.04
    maps[2, 9, 9] = 0.3
    chosen = LikelyPlaces(words)(None, shares.clamp(min=1e-9).log()).argmax(dim=1)
    middle = words + 42 * LOCATIONS + 22
    assert chosen.tolist() == [middle, middle, 2]


def test_what_was_ruled_out_is_not_chosen_as_a_likely_place():
    words = 7
    scores = torch.full((1, words + LOCATIONS**2), -50.0)
    places = scores[0, words:].view(LOCATIONS, LOCATIONS)
    places[40, 21] = 0.0
    places[:, :21] = torch.finfo(scores.dtype).min
    places[39:42, 22:24] = -1.0
    places[40, 20] = torch.finfo(scores.dtype).min  # in the middle of what is near
    row, column = divmod(int(LikelyPlaces(words)(None, scores).argmax()) - words, LOCATIONS)
    assert column >= 21
    assert row == 40


def test_what_is_learned_is_the_distribution_that_was_sampled_from(folder):
    """Each drawn token has the same probability while it is written and in one pass over the whole reply."""
    model, processor = load_policy(str(folder), device="cpu", dtype="float32").parts
    texts = ["<|user|>disc<image><|assistant|>", "<|user|>Segment the left lung.<image><|assistant|>"]
    batch = processor(text=texts, images=[make_image(1), make_image(2)], padding=True, return_tensors="pt")
    features = torch.randn(2, 128, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    out = model.generate(
        **batch,
        image_features=features,
        do_sample=True,
        top_k=0,
        max_new_tokens=24,
        return_dict_in_generate=True,
        output_scores=True,
    )
    start = batch["input_ids"].shape[1]
    whole, written = out.sequences, out.sequences[:, start:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(written)], dim=1)
    scored = torch.zeros_like(whole, dtype=torch.bool)
    scored[:, start - 1 : -1] = (written != processor.tokenizer.pad_token_id) | (written.cumsum(dim=1) == 0)
    with torch.inference_mode():
        logits = model(whole, batch["pixel_values"], mask, image_features=features, scored=scored).logits
        learned = model.readable.along(whole, scored, logits).log_softmax(dim=1)
    kept = scored[:, start - 1 : -1]
    drawn = torch.stack(out.scores, dim=1)[kept].log_softmax(dim=1)
    chosen = written[kept][:, None]
    assert drawn.gather(1, chosen).min() > -100
    torch.testing.assert_close(learned.gather(1, chosen), drawn.gather(1, chosen), atol=1e-3, rtol=1e-3)
    assert learned.exp().sum(dim=1).allclose(torch.ones(len(chosen)))


def test_a_box_is_read_from_a_map():
    region = torch.full((1, LOCATIONS, LOCATIONS), -9.0)
    region[0, 10:21, 30:46] = 9
    left, right, top, bottom = corner_densities(region)[0].unbind(dim=-1)
    assert left[0].argmax() == 30
    assert right[0].argmax() == 45
    assert top[:, 0].argmax() == 10
    assert bottom[:, 0].argmax() == 20


def test_proposals_begin_with_the_likeliest_reply_and_are_drawn_again_alike(folder):
    policy = load_policy(str(folder), device="cpu", dtype="float32", max_new_tokens=4, candidates=3)
    images = [Image(np.asarray(make_image(seed).convert("RGB"))) for seed in (1, 2)]
    observations = [Observation(str(number), image, "disc") for number, image in enumerate(images)]
    proposed = policy.propose(observations)
    assert [len(one.completions) for one in proposed] == [3, 3]
    assert [one.completions[0].text for one in proposed] == [one.text for one in policy.respond(observations)]
    assert [[c.text for c in one.completions] for one in policy.propose(observations)] == [
        [c.text for c in one.completions] for one in proposed
    ]
    begun = replace(observations[0], masks={"disc": np.ones(images[0].size, bool)})
    assert len(policy.propose([begun])[0].completions) == 1
    assert policy.describe()["candidates"] == "3"


@pytest.mark.parametrize("spec", ["centre-click", "oracle", "one-shot:ibis-nano", "endpoint:http://127.0.0.1:9/v1"])
def test_who_proposes_nothing_refuses_candidates(spec):
    with pytest.raises(ConfigError, match="leave candidates out"):
        load_policy(spec, candidates=2)


@pytest.mark.parametrize("sampled", [False, True])
def test_only_greedy_replies_choose_places_so(folder, monkeypatch, sampled):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    batch = AutoProcessor.from_pretrained(folder)(text="disc<image>", images=make_image(5), return_tensors="pt")
    calls = []
    monkeypatch.setattr(LikelyPlaces, "__call__", lambda self, ids, scores: calls.append(1) or scores)
    model.generate(**batch, image_features=torch.zeros(1, 128, 32, 32), max_new_tokens=2, do_sample=sampled)
    assert bool(calls) is not sampled


def test_two_images_in_one_conversation_give_each_place_its_own_image(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = "<|user|>disc<image><|assistant|>click<|end|><|user|>disc<image><|assistant|>"
    features = torch.randn(2, 128, 32, 32, generator=torch.Generator().manual_seed(3))
    both = processor(text=text, images=[[make_image(3), make_image(4)]], return_tensors="pt")
    first = processor(text=text.partition("<|assistant|>")[0], images=[make_image(3)], return_tensors="pt")
    with torch.inference_mode():
        long = model(**both, image_features=features).logits
        short = model(**first, image_features=features[:1]).logits
    places = slice(model.word_count, None)
    length = short.shape[1]
    torch.testing.assert_close(long[0, length - 1, places], short[0, -1, places], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(long[0, -1, places], long[0, length - 1, places], atol=1e-3)


def test_as_a_policy_it_embeds_an_image_once_and_speaks_alpha(folder):
    policy = load_policy(str(folder), device="cpu", dtype="float32", max_new_tokens=4)
    assert (policy.dialect, policy.history, policy.style) == ("ibis", "none", "alpha")
    pixels = np.full((61, 83, 3), 40, np.uint8)
    pixels[20:40, 30:60] = 200
    mask = np.zeros((61, 83), bool)
    mask[20:40, 30:60] = True
    bare = Observation("case", Image(pixels), "Segment the bright disc.")
    masked = Observation("case", Image(pixels), "Segment the bright disc.", {"bright disc": mask})
    replies = policy.respond([bare, masked])
    assert len(replies) == 2
    assert all(reply.tokens for reply in replies)
    assert len(policy.parts[0]._features._cache) == 1


def test_a_policy_keeps_its_tables_of_added_tokens_and_reads_the_same(folder):
    """Making them anew costs milliseconds for thousands of places, many times a conversation."""
    policy, processor = load_policy(str(folder), device="cpu", dtype="float32"), AutoProcessor.from_pretrained(folder)
    tokenizer = policy.parts[1].tokenizer
    assert tokenizer.added_tokens_encoder is tokenizer.added_tokens_encoder
    assert tokenizer.added_tokens_encoder == processor.tokenizer.added_tokens_encoder
    message = {"role": "user", "content": f"disc<|end|>{location_text(3, 4)}<image><think>"}
    reading = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    expected = processor.apply_chat_template([[message]], **reading)["input_ids"]
    assert policy.parts[1].apply_chat_template([[message]], **reading)["input_ids"] == expected
