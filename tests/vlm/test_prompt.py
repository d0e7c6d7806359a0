"""Positions, padding and places of a prompt, by hand."""

import pytest
import torch

from tests.conftest import run
from tests.vlm.models import vlm
from tokcompile import InputError
from tokcompile.vlm import split
from tokcompile.vlm.masks import Visibility
from tokcompile.vlm.positions import Positions
from tokcompile.vlm.prompt import Prompt


def prompt(images=((3, 7),), length=9, positions=None, mask=None):
    ids = torch.full((1, length), 7)
    for start, stop in images:
        ids[:, start:stop] = 60
    positions = torch.arange(length)[None] if positions is None else positions
    return Prompt.of(ids, 60, images, positions, mask)


GRID = torch.tensor([[[0, 1, 2, 3, 3, 3, 3, 5, 6]], [[0, 1, 2, 3, 3, 4, 4, 5, 6]], [[0, 1, 2, 3, 4, 3, 4, 5, 6]]])


def test_the_rule_behind_positions_of_three_axes():
    """An image of 2 x 2 tokens takes two positions."""
    rule = prompt(positions=GRID).rule
    assert [o.tolist() for o in rule.offsets] == [[[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]]
    assert rule.steps == (2,)
    shorter = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1]])
    got, after = rule(shorter, [(3, 7)])
    assert got[1, 0, 1:].tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    assert after.tolist() == [[5]]
    assert Positions.from_data(rule.data())(shorter, [(3, 7)])[0].tolist() == got.tolist()


def test_positions_that_follow_no_rule():
    odd = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 9, 8]])
    assert prompt(positions=odd).rule is None
    with pytest.raises(InputError, match="follow no rule"):
        prompt(positions=odd).positions(torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1]]))


def test_only_text_is_padding():
    with pytest.raises(InputError, match="only text can be padding"):
        prompt().positions(torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1]]))


def test_texts_are_padded_on_their_left_and_images_stay():
    ids, mask = prompt(((3, 5), (6, 9)), 11).lay_out([[1], [2], []], padded=True)
    assert ids.tolist() == [[0, 0, 1, 60, 60, 2, 60, 60, 60, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("texts", "padded", "message"),
    [
        ([[1, 2, 3, 4], [5]], True, "the text before the image has 4 tokens, and this model was made with room for 3"),
        ([[1, 2, 3], [5]], False, "after image 1 has 1 tokens, and this model takes exactly 2.*room="),
        ([[1, 2, 3]], True, "the prompt has 0 image.s., and this model was made for 1"),
        ([[1], [2], [3]], True, "the prompt has 2 image.s., and this model was made for 1"),
    ],
)
def test_texts_that_do_not_fit(texts, padded, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        prompt().lay_out(texts, padded)


def test_a_run_of_placeholders_is_one_image():
    assert prompt().texts_of([1, 60, 2, 60, 60, 3]) == [[1], [2], [3]]


def test_what_is_left_keeps_its_place():
    two = prompt(((3, 7), (8, 11)), 13)
    kept = torch.tensor([[0, 3, 5, 6], [1, 2, 4, 6]])
    short = two.shortened(kept)
    assert (short.spans, short.length) == (((3, 5), (6, 8)), 10)
    assert short.rows(kept).tolist() == [[0, 1, 2, 3, 6, 7, 9, 10, 11, 12], [0, 1, 2, 4, 5, 7, 8, 10, 11, 12]]
    with pytest.raises(InputError, match="other numbers of tokens in each sample"):
        two.shortened(torch.tensor([[0, 3, 5, 6], [0, 1, 2, 6]]))


def test_data_is_read_back():
    for one in (
        prompt(positions=GRID),
        prompt().shortened(torch.tensor([[1, 3]])),
        prompt(positions=torch.arange(9, 0, -1)[None]),
    ):
        again = Prompt.from_data(one.data())
        assert again.data() == one.data()
        assert again.position_ids.tolist() == one.position_ids.tolist()


def test_padding_joins_the_text_after_it_where_that_attends_both_ways():
    view = Visibility((None,), {None: torch.tensor([0, 0, 0, 0, 0])}).widened([None, 0, 1, 2, None, 3, 4], [(2, 4)])
    assert view.groups[None].unique().numel() == 1
    view = Visibility((None,), {None: torch.tensor([0, 1, 1, 3, 4])}).widened([None, 0, 1, 2, None, 3, 4], [(2, 4)])
    assert view.groups[None].unique().numel() == 6


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "paligemma", "gemma3"])
def test_padding_changes_nothing(name):
    """The parts with room for more text, and padding on the left of each, give what the model gives without any."""
    model, inputs = vlm(name)
    want = run(model, **inputs).logits[:, -1:]
    start, stop = split(model, inputs).spans[0]
    ids = inputs["input_ids"][0].tolist()
    parts = split(model, inputs, room=[start + 4, len(ids) - stop + 3])
    padded, mask = parts.prompt.lay_out([ids[:start], ids[stop:]], True)
    assert mask.sum() == len(ids) < mask.shape[1]
    got = parts(inputs["pixel_values"], padded, mask)["logits"]
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert parts.prompt.positions(mask)[1].tolist() == split(model, inputs).next_position.tolist()


def test_another_text_in_the_same_room():
    model, inputs = vlm("qwen3_vl")
    parts = split(model, inputs, room=[6, 9])
    ids = torch.tensor([[4, 5] + [60] * 12 + [9, 8, 7]])
    other = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 60).int()}
    want = run(model, **other).logits[:, -1:]
    got = parts(inputs["pixel_values"], *parts.prompt.lay_out(parts.prompt.texts_of(ids[0].tolist()), True))["logits"]
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_room_that_does_not_fit():
    model, inputs = vlm("llava")
    with pytest.raises(InputError, match=r"room=\[4, 12\], and the example has \[5, 7\] tokens"):
        split(model, inputs, room=[4, 12])
    with pytest.raises(InputError, match="padded=False"):
        split(model, inputs, room=[9, 12], padded=False)
