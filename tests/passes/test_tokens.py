"""Labels: views regroup the same atoms, and refuse to tear tokens apart."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcompile.passes.tokens import (
    Batch,
    Seq,
    Space,
    SplitsTokens,
    describe,
    has_batch,
    has_tokens,
    is_labelled,
    make_seq,
    new,
    new_shape,
    normal,
    old,
    old_shape,
    plain,
    regroup,
    tokens_of,
)

S = Space("s", 10, 4)
SEQ = Seq((1, S))
DRAWS = settings(max_examples=200, deadline=None, derandomize=True)

atoms = st.one_of(st.integers(2, 6), st.just(Batch(3)), st.just(SEQ))
axes = st.lists(atoms, max_size=3).map(normal)
labels = st.lists(axes, min_size=1, max_size=4).map(tuple)


def flat(label) -> list:
    """All atoms in order, neighbouring plain factors multiplied out."""
    return list(normal([a for axis in label for a in axis]))


def grouping(draw, label) -> list[int]:
    """A shape that only joins atoms, or cuts plain ones."""
    shape, product = [], 1
    for atom in flat(label):
        sizes = [old((atom,))]
        if isinstance(atom, int):
            cut = draw(st.sampled_from([d for d in range(1, atom + 1) if atom % d == 0]))
            sizes = [cut, atom // cut]
        for size in sizes:
            product *= size
            if draw(st.booleans()):
                shape.append(product)
                product = 1
    return [*shape, product]


# -- spaces and axes ---------------------------------------------------------------------------------------------------


def test_a_space_knows_its_ancestors():
    child = Space("t", 4, 2, S)
    assert (S.root_n, child.root_n) == (10, 10)
    assert child.lineage() == [child, S]
    assert (repr(S), repr(child)) == ("s:10->4", "t:10->2")


def test_two_spaces_of_the_same_sizes_are_two():
    assert Space("s", 10, 4) != Space("s", 10, 4)
    assert Seq((1, S)) == Seq((1, S))
    assert Seq((1, S)) != Seq((S, 1))


def test_sizes_before_and_after():
    seq = Seq((1, S, 2))
    assert (seq.old, seq.new, seq.spaces) == (13, 7, (S,))
    axis = (Batch(3), seq, 5)
    assert (old(axis), new(axis)) == (195, 105)
    assert (old(()), new(())) == (1, 1)


@pytest.mark.parametrize(("parts", "seq"), [
    ([1, 2, S], Seq((3, S))),
    ([0, S, 0], Seq((S,))),
    ([S, 1, 0, 2], Seq((S, 3))),
    ([S, S], Seq((S, S))),
], ids=str)  # fmt: skip
def test_neighbouring_plain_tokens_are_one_part(parts, seq):
    assert make_seq(parts) == seq


@pytest.mark.parametrize(("axis", "want"), [
    ((1, 1), ()),
    ((2, 1, 3), (6,)),
    ((2, SEQ, 3, 2), (2, SEQ, 6)),
    ((Seq((4,)), 2), (8,)),
    ((Batch(3), 1), (Batch(3),)),
], ids=str)  # fmt: skip
def test_axes_have_one_normal_form(axis, want):
    assert normal(axis) == want


def test_labels_print_readably():
    label = ((Batch(2),), (SEQ,), (), (384,), (SEQ, 4))
    assert describe(label) == "[B2, Seq(1 + s:10->4), 1, 384, Seq(1 + s:10->4)*4]"
    assert describe(None) == "unlabelled"


def test_what_an_axis_holds():
    assert has_tokens((2, SEQ))
    assert not has_tokens((2, Batch(2)))
    assert has_batch((Batch(2), 3))
    assert tokens_of((SEQ,)) == SEQ
    assert tokens_of((SEQ, 2)) is None
    assert is_labelled(((2,), (SEQ,)))
    assert not is_labelled(((Batch(2),), (4,)))
    assert not is_labelled(None)
    assert plain((1, 2, 3)) == ((), (2,), (3,))


# -- regrouping --------------------------------------------------------------------------------------------------------


@DRAWS
@given(label=labels, data=st.data())
def test_a_view_keeps_atoms_and_their_order(label, data):
    shape = grouping(data.draw, label)
    got = regroup(label, shape)
    assert old_shape(got) == tuple(shape)
    assert flat(got) == flat(label)
    assert prod(new_shape(got)) == prod(new_shape(label))
    assert all(axis == normal(axis) for axis in got)


@DRAWS
@given(label=labels)
def test_a_view_of_the_same_shape_changes_nothing(label):
    assert regroup(label, old_shape(label)) == label


@DRAWS
@given(label=labels, data=st.data())
def test_a_view_of_a_view_is_the_view(label, data):
    first, second = grouping(data.draw, label), grouping(data.draw, label)
    assert regroup(regroup(label, first), second) == regroup(label, second)
    assert regroup(regroup(label, first), old_shape(label)) == label


@DRAWS
@given(label=labels, data=st.data())
def test_any_other_shape_is_right_or_an_error(label, data):
    shape = data.draw(st.permutations(grouping(data.draw, label)))
    try:
        got = regroup(label, shape)
    except (ValueError, SplitsTokens):
        return
    assert old_shape(got) == tuple(shape)
    assert flat(got) == flat(label)


@pytest.mark.parametrize(("label", "shape", "want"), [
    (((Batch(2),), (SEQ,), (48,)), (2, 11, 4, 12), ((Batch(2),), (SEQ,), (4,), (12,))),
    (((Batch(2),), (SEQ,), (48,)), (22, 48), ((Batch(2), SEQ), (48,))),
    (((Batch(2),), (4,), (SEQ,), (12,)), (8, 11, 12), ((Batch(2), 4), (SEQ,), (12,))),
    (((Batch(2), SEQ), (48,)), (2, 11, 48), ((Batch(2),), (SEQ,), (48,))),
    (((Batch(2),), (SEQ,), (8,)), (2, 88), ((Batch(2),), (SEQ, 8))),
    (((2,), (SEQ, 8)), (2, 11, 1, 8), ((2,), (SEQ,), (), (8,))),
], ids=["heads", "rows", "heads-in-the-batch", "rows-back", "flat", "flat-back"])  # fmt: skip
def test_views_of_models(label, shape, want):
    assert regroup(label, shape) == want


@pytest.mark.parametrize(("label", "shape", "unit"), [
    (((Seq((Space("g", 12, 6),)),), (8,)), (3, 4, 8), 4),
    (((Seq((Space("g", 12, 6),)),), (8,)), (4, 3, 8), 3),
    (((Seq((Space("g", 12, 6),)),), (8,)), (3, 32), 4),
    (((2,), (Seq((Space("g", 12, 6),)),), (8,)), (4, 6, 8), None),
    (((SEQ,), (8,)), (8, 11), None),
], ids=["groups-of-4", "groups-of-3", "merger", "across", "transposed"])  # fmt: skip
def test_a_view_that_tears_tokens_says_into_which_groups(label, shape, unit):
    with pytest.raises(SplitsTokens, match="a view splits Seq") as split:
        regroup(label, shape)
    assert split.value.unit == unit


@pytest.mark.parametrize("shape", [(5,), (2, 11, 49), (3, 11, 32)], ids=str)
def test_a_view_of_another_number_of_elements(shape):
    with pytest.raises((ValueError, SplitsTokens)):
        regroup(((2,), (SEQ,), (48,)), shape)
