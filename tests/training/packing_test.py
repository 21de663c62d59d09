"""Arrays in pieces: whatever they were cut into, any box of them can be put together."""

import hashlib
import json

import numpy as np
import pytest

from qkv_jax.training.packing import (
    DamagedError,
    Piece,
    assemble,
    make_manifest,
    pack,
    unpack,
)


def cut(name, array, rows, columns):
    """The array in rows x columns pieces."""
    for i, part in enumerate(np.array_split(array, rows, axis=0)):
        for j, piece in enumerate(np.array_split(part, columns, axis=1)):
            start = (i * array.shape[0] // rows, j * array.shape[1] // columns)
            yield Piece(name, array.dtype.name, array.shape, start, piece)


ARRAY = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (3, 2), (1, 5), (6, 4)])
def test_any_boxes_are_put_together_from_any_pieces(rows, columns):
    boxes = [((0, 6), (0, 20)), ((0, 1), (0, 20)), ((2, 5), (3, 17)), ((4, 4), (0, 20))]
    pieces = reversed(list(cut("a", ARRAY, rows, columns)))
    (leaf,) = assemble(pieces, {"a": boxes}).values()
    assert (leaf.dtype, leaf.shape, set(leaf.boxes)) == (ARRAY.dtype, ARRAY.shape, set(boxes))
    for ((a, b), (c, d)), array in leaf.boxes.items():
        np.testing.assert_array_equal(array, ARRAY[a:b, c:d])


def test_what_is_not_asked_for_or_does_not_fit_comes_whole():
    pieces = [*cut("a", ARRAY, 2, 2), *cut("b", ARRAY, 1, 2)]
    found = assemble(pieces, {"a": [((0, 7), (0, 20))]})
    for leaf in found.values():
        (array,) = leaf.boxes.values()
        np.testing.assert_array_equal(array, ARRAY)


def test_a_missing_or_a_repeated_piece_is_damage_where_it_is_needed():
    first, *rest = cut("a", ARRAY, 2, 2)
    with pytest.raises(DamagedError, match="a part of leaf a is missing"):
        assemble(rest, {})
    with pytest.raises(DamagedError, match="a part of leaf a is there twice"):
        assemble([first, first, *rest[1:]], {})
    elsewhere = {"a": [((3, 6), (0, 20))]}
    assert len(assemble(rest, elsewhere)["a"].boxes) == 1


def test_what_is_packed_comes_back_and_a_flipped_bit_does_not():
    tree = {"a": ARRAY, "b": {"c": np.float32(3), "d": np.zeros((0, 5), np.int8)}}
    buffer, layout = pack(tree)
    manifest = make_manifest(buffer, layout, 7)
    found = assemble(unpack(buffer, manifest, 7), {})
    assert {name: leaf.shape for name, leaf in found.items()} == {
        "a": (6, 20),
        "b/c": (),
        "b/d": (0, 5),
    }
    np.testing.assert_array_equal(found["a"].boxes[((0, 6), (0, 20))], ARRAY)
    assert found["b/c"].boxes[()] == 3
    with pytest.raises(DamagedError, match="manifest"):
        list(unpack(buffer, manifest, 8))
    buffer[13] ^= 4
    with pytest.raises(DamagedError, match="the checksum of leaf a"):
        list(unpack(buffer, manifest, 7))


def test_a_manifest_of_the_format_before_is_still_read():
    buffer, layout = pack({"a": ARRAY, "b": np.arange(3)})
    manifest = make_manifest(buffer, layout, 7)
    leaves = {
        piece["name"]: {key: piece[key] for key in ("dtype", "shape", "offset", "sha256")}
        for piece in manifest["pieces"]
    }
    before = {"format": 1, "step": 7, "leaves": leaves}
    text = json.dumps(before, sort_keys=True).encode()
    before["sha256"] = hashlib.sha256(text).hexdigest()
    found = assemble(unpack(buffer, before, 7), {})
    np.testing.assert_array_equal(found["a"].boxes[((0, 6), (0, 20))], ARRAY)
    np.testing.assert_array_equal(found["b"].boxes[((0, 3),)], np.arange(3))
