"""Several processes that train as one program: how they meet, agree, and share arrays out.

Each has some of the devices. All run the same program and reach the same collectives in the same
order, so whatever only one of them can know (a signal, a clock, what a disk holds) is made known to
all before it decides anything. With one process everything here returns at once.
"""

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client, as Orbax uses it: JAX has no public name for it
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
FAILED = "qkv_jax/failed"  # the coordinator's key under which a process says why it ends
_joined = _left = False


def join(
    coordinator: str | None,
    process_count: int | None,
    process_index: int | None,
    *,
    timeout: int,
    fail: Callable[[str], Any],
) -> None:
    """Waits for all processes, before JAX knows its devices; see `jax.distributed.initialize`.

    Args:
      coordinator: host:port of process 0; None: as the environment says (JAX_COORDINATOR_ADDRESS,
        Slurm, Open MPI, a TPU pod).
      process_count: how many processes; None: as the cluster says.
      process_index: of this one, from 0; None: as the cluster says.
      timeout: seconds to wait for the others.
      fail: is called from another thread, with a sentence: the others do not come, or later one of
        them says that it fails, or process 0 ends. It ends this process, which waits in JAX.

    Raises:
      ValueError: naming the argument that is wrong, or missing where no cluster says it.
    """
    _check(coordinator, process_count, process_index)
    detect = None in (coordinator, process_count, process_index)
    # JAX's own time limit aborts the process.
    watch = threading.Timer(
        timeout, lambda: fail(_did_not_come(coordinator, process_index, timeout))
    )
    watch.daemon = True
    watch.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            coordinator, process_count, process_index,
            initialization_timeout=timeout + 60, heartbeat_timeout_seconds=HEARTBEAT,
            cluster_detection_method=None if detect else "deactivate",
        )  # fmt: skip
        jax.devices()  # which the processes exchange too
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the processes cannot meet ({reason}): wanted coordinator, process_count and "
            "process_index, or a cluster that JAX knows"
        ) from error
    finally:
        watch.cancel()
    global _joined
    _joined = True
    atexit.register(_leave)  # before JAX does what it has registered
    threading.Thread(target=_listen, args=(fail,), daemon=True).start()


def _listen(fail: Callable[[str], Any]) -> None:
    """Ends this process when another one says that it fails, or is no longer there to ask."""
    while not _left:
        try:
            said = distributed.global_state.client.blocking_key_value_get(FAILED, 10_000)
        except Exception as error:
            if _left or "DEADLINE_EXCEEDED" in str(error):
                continue
            said = "process 0 has ended, or cannot be reached"
        if not _left:
            fail(said)
        return


def announce(reason: str) -> None:
    """Tells the other processes that this one ends, and why, so that they do not wait for it."""
    if not _joined:
        return
    said = f"process {index()} ended: {reason}"
    with contextlib.suppress(Exception):  # process 0 may have gone
        distributed.global_state.client.key_value_set(FAILED, said, allow_overwrite=True)
    if is_first():
        time.sleep(1)  # the others ask this process


def _leave() -> None:
    global _left
    _left = True


def _did_not_come(coordinator: str | None, index: int | None, timeout: int) -> str:
    who = "this process" if index is None else f"process {index}"
    where = coordinator or "the address that the cluster names"
    return (
        f"{who} waited {timeout} s at {where}, and not all of the processes came; start every one "
        "of them, with the same coordinator and process_count and a process_index of its own"
    )


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    host, _, port = (coordinator or "host:1").rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator: wanted host:port of process 0, got {coordinator!r}")
    if count is not None and count < 1:
        raise ValueError(f"process_count: wanted an integer >= 1, got {count}")
    if index is not None and not 0 <= index < (count or index + 1):
        raise ValueError(f"process_index: wanted an integer in [0, {count}), got {index}")


def leave() -> None:
    """Parts from the others, who do the same: what comes after is computed alone."""
    if count() > 1:
        _leave()
        jax.distributed.shutdown()


def count() -> int:
    """How many processes there are."""
    return 1 if _left else jax.process_count()


def index() -> int:
    """Which of the processes this is."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the one process that prints, and writes what is written once."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """What each process says, by index: anything that JSON can hold."""
    if count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(mine.size))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: mine.size] = mine
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:n].tobytes().decode()) for text, n in zip(texts, lengths, strict=True)]


class Ballot:
    """What one process wishes, all do: asked at every dispatch, and answered at the next one.

    The answer is computed by the devices behind the steps that they have been given, so that
    nobody waits for it. A wish has to be repeated until it is granted.

    Args:
      mesh: of all devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(
            lambda wishes: wishes.max(0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._cast: jax.Array | None = None

    def cast(self, *wishes: bool) -> list[bool]:
        """Says what this process wishes; returns which of the wishes before any process had.

        What is granted now is not wished for again.
        """
        if count() == 1:
            return list(wishes)
        granted = [False] * len(wishes)
        if self._cast is not None:
            granted = np.asarray(self._cast).astype(bool).tolist()
        mine = [wish and not had for wish, had in zip(wishes, granted, strict=True)]
        mine = np.asarray([mine], np.int32)
        self._cast = self._any(
            jax.make_array_from_callback(
                (self._by_device.mesh.size, len(wishes)), self._by_device, lambda _: mine
            )
        )
        return granted


def place(tree: Any, where: Any) -> Any:
    """Arrays that every process has whole, cut over the devices of all.

    Args:
      tree: a pytree of arrays.
      where: the sharding of all its leaves, or a pytree of shardings.
    """
    if count() == 1:
        return jax.device_put(tree, where)
    if isinstance(where, Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def placed(x: Any, sharding: Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(placed, tree, where)


def place_rows(
    read: Callable[[slice], dict[str, np.ndarray]], batch_size: int, where: NamedSharding
) -> dict[str, jax.Array]:
    """Batches cut over the devices of all processes, of which each reads its own rows.

    Args:
      read: returns some rows of the batches, [steps, rows, ...].
      batch_size: rows of a batch, over all processes.
      where: cuts the second axis of each array, and no other.
    """
    if count() == 1:
        return jax.device_put(read(slice(None)), where)
    rows = rows_of_process(batch_size, where)

    def placed(mine: np.ndarray) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(batch_size)
            return mine[:, start - rows.start : stop - rows.start]

        shape = mine.shape[0], batch_size, *mine.shape[2:]
        return jax.make_array_from_callback(shape, where, of_device)

    return {name: placed(mine) for name, mine in read(rows).items()}


def rows_of_process(batch_size: int, where: NamedSharding) -> slice:
    """The rows that the devices of this process have, and those between them.

    Processes that share a row, since an axis of the mesh other than its rows crosses them, read it
    each.
    """
    rows = where.addressable_devices_indices_map((1, batch_size)).values()
    bounds = [index[1].indices(batch_size) for index in rows]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def whole(tree: Any) -> Any:
    """Every array of a pytree whole, on every process: of parameters that are cut over them."""
    return tree if count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def alone() -> contextlib.AbstractContextManager:
    """What is computed in it is computed by each process, on a device of its own.

    With one process nothing changes: it has the mesh.
    """
    if count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("alone",)))
