"""Operands: the pytree that masks and scores are, alignment, and the checks of both."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks, scores
from qkv_jax.ops.operands import Operands, check_aligned, operand

B, N, T, S = 2, 3, 5, 7


def leaves_of(obj):
    return jax.tree.leaves(obj)


def test_arrays_are_leaves_and_numbers_functions_and_none_are_structure():
    tree = masks.SlidingWindow(np.arange(N), None) & ~masks.Chunked(4)
    assert [leaf.shape for leaf in leaves_of(tree)] == [(N,)]
    mask = masks.from_function(len, 2, np.ones((1, N, 1, 1)), "text", jnp.zeros(3))
    assert [leaf.shape for leaf in leaves_of(mask)] == [(1, N, 1, 1), (3,)]


def test_masks_inside_masks_are_children_with_or_without_arrays():
    tree = masks.Causal() & ~masks.Chunked(4)
    parts = jax.tree.leaves(tree, is_leaf=lambda x: not isinstance(x, masks.And | masks.Not))
    assert parts == [masks.Causal(), masks.Chunked(4)]


def test_equal_numbers_give_equal_structures_and_other_numbers_types_or_functions_do_not():
    structure = jax.tree.structure
    assert structure(masks.Chunked(4)) == structure(masks.Chunked(4))
    assert structure(masks.Chunked(4)) != structure(masks.Chunked(5))
    assert hash(structure(masks.Chunked(4))) == hash(structure(masks.Chunked(4)))
    one, true = (masks.from_function(len, static) for static in (1, True))
    assert structure(one) != structure(true)
    assert structure(masks.from_function(len)) != structure(masks.from_function(max))
    assert structure(masks.Causal() & masks.Dilated(2)) != structure(
        masks.Causal() | masks.Dilated(2)
    )


def test_instances_are_equal_when_their_numbers_and_their_very_arrays_are():
    ids = np.zeros(T, np.int32)
    assert masks.Causal() == masks.Causal() and hash(masks.Causal()) == hash(masks.Causal())
    assert masks.Causal() & masks.Segments(ids) == masks.Causal() & masks.Segments(ids)
    assert masks.Segments(ids) != masks.Segments(ids.copy())
    assert masks.Chunked(2) != masks.Chunked(3) and masks.Chunked(2) != "text"


def test_instances_are_frozen():
    with pytest.raises(AttributeError):
        masks.Chunked(2).size = 3


@pytest.mark.parametrize("placeholder", [None, 0, "spec", object()])
def test_placeholders_for_leaves_flatten_to_the_same_structure(placeholder):
    tree = masks.Segments(np.zeros(T, int)) & masks.from_function(len, 2, np.ones(3))
    leaves, structure = jax.tree.flatten(tree)
    replaced = jax.tree.unflatten(structure, [placeholder] * len(leaves))
    again = jax.tree.flatten(replaced, is_leaf=lambda x: x is None)
    assert again == ([placeholder] * len(leaves), structure)


def test_operands_survive_copying_and_pickling():
    mask = jax.tree.map(lambda x: x, masks.Lengths(np.arange(B)) & masks.Chunked(2))
    for same in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert jax.tree.structure(same) == jax.tree.structure(mask)


def test_paths_name_the_fields():
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            masks.Causal() & masks.from_function(len, 2, np.ones(3))
        )
    ]
    assert paths == [".right.operands[1]"]


def test_natural_shapes_align_with_the_axes_they_name():
    def shapes(obj):
        return [leaf.shape for leaf in leaves_of(obj.aligned())]

    assert shapes(masks.Segments(np.zeros((B, T), int), np.zeros(S, int))) == [
        (B, 1, T, 1),
        (1, 1, 1, S),
    ]
    assert shapes(masks.Segments(np.zeros(T, int))) == [(1, 1, T, 1), (1, 1, 1, T)]
    assert shapes(masks.Lengths(np.zeros(B, int))) == [(B, 1, 1, 1)]
    assert shapes(masks.Prefix(np.array(3))) == [(1, 1, 1, 1)]
    assert shapes(masks.SlidingWindow(np.zeros(N, int))) == [(1, N, 1, 1)]
    assert shapes(masks.Dense(np.ones((T, S), bool))) == [(1, 1, T, S)]
    assert shapes(scores.Bias(np.ones((N, T, S)))) == [(1, N, T, S)]
    assert shapes(scores.Bias(np.ones((B, 1, T, S)))) == [(B, 1, T, S)]
    assert shapes(scores.RelativeBias(np.ones((32, N)))) == [(32, N)]
    assert shapes(~(masks.Causal() & masks.Lengths(np.zeros(B, int)))) == [(B, 1, 1, 1)]


def test_aligning_twice_is_aligning_once_and_numpy_stays_numpy():
    mask = masks.Segments(np.zeros((B, T), int)) & masks.Blocks(np.ones((N, 2, 2), bool), 3)
    once = mask.aligned()
    assert all(type(leaf) is np.ndarray for leaf in leaves_of(once))
    twice = once.aligned()
    assert [x.shape for x in leaves_of(twice)] == [x.shape for x in leaves_of(once)]


def test_a_gradient_through_alignment_has_the_natural_shape():
    alibi = scores.Alibi(jnp.arange(1.0, N + 1))
    gradient = jax.grad(lambda score: (score.aligned().slopes ** 2).sum())(alibi)
    assert isinstance(gradient, scores.Alibi)
    np.testing.assert_allclose(gradient.slopes, 2 * alibi.slopes)


def test_jit_compiles_once_for_equal_structures():
    traces = []

    @jax.jit
    def run(mask):
        traces.append(mask)
        return mask.aligned().kv_lengths.sum()

    assert run(masks.Lengths(np.arange(B))) == 1
    assert run(masks.Lengths(np.arange(B) + 1)) == 3
    assert len(traces) == 1


def test_constructors_and_alignment_work_under_jit_vmap_and_eval_shape():
    lengths = jnp.arange(3 * B).reshape(3, B)

    def aligned(x):
        return masks.Lengths(x).aligned().kv_lengths

    assert jax.jit(aligned)(lengths[0]).shape == (B, 1, 1, 1)
    assert jax.vmap(aligned)(lengths).shape == (3, B, 1, 1, 1)
    assert jax.eval_shape(aligned, jax.ShapeDtypeStruct((B,), jnp.int32)).shape == (B, 1, 1, 1)
    stacked = jax.vmap(masks.Lengths)(lengths)
    assert jax.vmap(lambda mask: mask.aligned().kv_lengths)(stacked).shape == (3, B, 1, 1, 1)
    axes = jax.tree.map(lambda _: 0, stacked)
    assert jax.vmap(lambda m: m.kv_lengths.sum(), in_axes=(axes,))(stacked).tolist() == [1, 5, 9]
    described = masks.Lengths(jax.ShapeDtypeStruct((B,), jnp.int32))
    assert len(leaves_of(described)) == 1


def test_a_wrong_rank_that_comes_around_the_constructor_is_an_error_too():
    stacked = jax.tree.map(lambda x: np.stack([x, x]), masks.Lengths(np.arange(B)))
    with pytest.raises(ValueError, match=r"Lengths: kv_lengths must be .* got int64\[2,2\]"):
        stacked.aligned()


def test_check_aligned_names_the_class_the_field_and_both_shapes():
    mask = masks.Causal() | ~masks.Segments(np.zeros((B, T), int), np.zeros((B, S), int))
    check_aligned(mask.aligned(), "mask", B=B, N=N, T=T, S=S)
    with pytest.raises(
        ValueError, match=r"mask: Segments.kv_ids has shape \[2, 1, 1, 7\].*\[2, 3, 5, 11\]"
    ):
        check_aligned(mask.aligned(), "mask", B=B, N=N, T=T, S=11)
    tuple_of_scores = (scores.Softcap(2.0), scores.Alibi(np.ones(N)).aligned())
    check_aligned(tuple_of_scores, "score", B=B, N=N, T=T, S=S)
    with pytest.raises(ValueError, match=r"score: Alibi.slopes has shape \[1, 3, 1, 1\]"):
        check_aligned(tuple_of_scores, "score", B=B, N=N + 1, T=T, S=S)
    check_aligned(None, "score", B=B, N=N, T=T, S=S)
    nested = masks.from_function(len, [np.ones((1, 4, 1, 1))])
    with pytest.raises(ValueError, match=r"FromFunction.operands\[0\]"):
        check_aligned(nested.aligned(), "mask", B=B, N=N, T=T, S=S)


def test_a_static_field_that_cannot_be_hashed_is_an_error_when_it_is_given():
    with pytest.raises(ValueError, match="FromFunction: operands must be an array or hashable"):
        masks.from_function(len, [1, 2])


def test_numpy_scalars_count_as_numbers():
    assert masks.Chunked(np.int64(4)) == masks.Chunked(4)
    assert not leaves_of(masks.SlidingWindow(np.int32(4)))


def test_a_subclass_of_ones_own_is_a_pytree_with_checked_fields():
    class Shift(Operands):
        by: int | np.ndarray = operand("", "B", dtype="integer", number=True, sign="positive")
        note: str = "none"

    assert not leaves_of(Shift(3)) and leaves_of(Shift(np.arange(B)))
    assert (
        repr(Shift(np.arange(B)))
        == f"{Shift.__qualname__.split('.')[-1]}(by=int64[2], note='none')"
    )
    with pytest.raises(
        ValueError, match="Shift: by must be a positive integer or an integer array"
    ):
        Shift(0)
