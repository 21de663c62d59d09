"""What several processes have in common, as one process sees it; `distributed_test.py` has two."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import processes, sharding

MESH = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), batch_size=12)


def test_one_process_is_the_first_and_agrees_with_itself():
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert processes.Ballot(MESH).cast(True, False) == [True, False]
    processes.leave()
    processes.announce("nothing")


def test_the_rows_of_a_process_are_those_of_its_devices():
    where = NamedSharding(MESH, PartitionSpec(None, ROWS))
    assert processes.rows_of_process(12, where) == slice(0, 12)  # all devices are its own
    batch = {"inputs": np.arange(24).reshape(2, 12, 1)}
    placed = processes.place_rows(lambda rows: {k: x[:, rows] for k, x in batch.items()}, 12, where)
    np.testing.assert_array_equal(placed["inputs"], batch["inputs"])
    assert placed["inputs"].sharding == where


def test_arrays_are_placed_and_come_back_whole():
    tree = {"a": np.arange(12.0), "b": np.arange(4)}
    where = {
        "a": NamedSharding(MESH, PartitionSpec(ROWS)),
        "b": NamedSharding(MESH, PartitionSpec()),
    }
    for shardings in (where, where["b"]):
        placed = processes.place(tree, shardings)
        assert jax.tree.all(jax.tree.map(np.array_equal, processes.whole(placed), tree))
    assert placed["a"].sharding == where["b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host", 2, 0), "coordinator: wanted host:port of process 0, got 'host'"),
        (("host:0", 2, 0), "coordinator: wanted host:port"),
        (("host:1", 0, 0), "process_count: wanted an integer >= 1, got 0"),
        (("host:1", 2, 2), r"process_index: wanted an integer in \[0, 2\), got 2"),
        (("host:1", 2, -1), "process_index"),
    ],
)
def test_what_does_not_say_who_is_who_is_an_error_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        processes.join(*arguments, timeout=1, fail=print)
