"""Arrays in files: what NumPy says of the array, with as much read as is asked for."""

import gc
import os

import numpy as np
import pytest

from qkv_jax.data import ArrayFile
from qkv_jax.data.array_file import MARK_EVERY


def write(path, array):
    np.save(path, array)
    return ArrayFile.open(path)


@pytest.fixture
def pair(tmp_path):
    """An array, and the same in a file."""
    array = np.random.RandomState(0).randint(0, 5000, 1009).astype(np.uint16)
    return array, write(tmp_path / "a.npy", array)


def test_it_has_the_items_and_the_type_of_the_array(pair):
    array, file = pair
    assert (len(file), file.size, file.shape, file.ndim) == (1009, 1009, (1009,), 1)
    assert file.dtype == np.uint16 == np.asarray(file).dtype
    np.testing.assert_array_equal(np.asarray(file), array)
    assert np.asarray(file, np.int32).dtype == np.int32 and file.max() == array.max()


@pytest.mark.parametrize("key", [
    slice(None), slice(7), slice(5, 9), slice(-11, None), slice(5, 2), slice(1000, 2000), 0, -1,
    1008, np.array([[3, 1000], [4, 3]]), np.array([], np.int64), [-1, 5],
], ids=str)  # fmt: skip
def test_an_index_gives_what_numpys_gives_also_of_a_part(pair, key):
    array, file = pair
    for a, b in ((array, file), (array[13:1009], file[13:]), (array[100:], file[13:][87:])):
        if isinstance(key, slice) or np.max(key, initial=0) < len(a):
            np.testing.assert_array_equal(np.asarray(b[key]), a[key])


def test_an_index_out_of_range_and_a_step_are_refused(pair):
    _, file = pair
    for key in (1009, -1010, [5, 1009]):
        with pytest.raises(IndexError, match="1009 items"):
            file[key]
    with pytest.raises(ValueError, match="step of 2"):
        file[::2]
    with pytest.raises(ValueError, match="not in memory"):
        np.array(file, copy=False)


@pytest.mark.parametrize("length", [1, MARK_EVERY - 1, MARK_EVERY, 2 * MARK_EVERY + 1, 10_007])
@pytest.mark.parametrize("side", ["left", "right"])
def test_places_in_a_rising_file_are_those_in_the_array(tmp_path, length, side):
    random = np.random.RandomState(length)
    array = np.sort(random.randint(0, 3 * length, length))
    file = write(tmp_path / "a.npy", array)
    edges = array[:: MARK_EVERY // 2]
    values = np.concatenate([[-1, 10**9], edges - 1, edges, edges + 1, random.randint(0, 99, 7)])
    expected = np.searchsorted(array, values, side)
    np.testing.assert_array_equal(np.searchsorted(file, values, side), expected)
    part = np.searchsorted(file[length // 3 :], values.reshape(-1, 1), side=side)
    np.testing.assert_array_equal(part[:, 0], np.searchsorted(array[length // 3 :], values, side))


def test_a_slice_reads_nothing_and_an_item_little(pair, monkeypatch):
    _, file = pair
    read, pread = [], os.pread

    def counted(descriptor, number, begin):
        read.append(number)
        return pread(descriptor, number, begin)

    monkeypatch.setattr(os, "pread", counted)
    part = file[100:900]
    assert read == []
    part[[3, 5]]
    assert read == [6]


def test_a_read_that_comes_in_pieces_is_put_together(pair, monkeypatch):
    array, file = pair
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda d, number, begin: pread(d, min(number, 7), begin))
    np.testing.assert_array_equal(np.asarray(file), array)


def test_a_file_that_is_truncated_is_named_where_its_end_is_reached(pair):
    array, file = pair
    os.truncate(file.path, os.path.getsize(file.path) - 200)
    np.testing.assert_array_equal(np.asarray(file[:909]), array[:909])
    with pytest.raises(ValueError, match=r"a.npy ends at byte \d+; wanted 2 more: it was trunc"):
        np.asarray(file[905:910])


def test_a_file_that_cannot_be_read_is_named(pair, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error.*a.npy"):
        np.asarray(pair[1])


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.array(5)], ids=["matrix", "number"])
def test_other_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a.npy has no array of one axis"):
        ArrayFile.open(tmp_path / "a.npy")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_the_file_is_open_as_long_as_a_part_of_it_is_there(tmp_path):
    part = write(tmp_path / "a.npy", np.arange(7))[2:4]

    def is_open():
        gc.collect()
        names = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return str(tmp_path / "a.npy") in [os.readlink(n) for n in names if os.path.islink(n)]

    assert is_open() and np.asarray(part).tolist() == [2, 3]
    del part
    assert not is_open()
