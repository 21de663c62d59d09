"""The flags of scripts that run as several processes, each with some of the devices.

    python -m experiments.train --coordinator=host:1234 --process_count=2 --process_index=0 &
    python -m experiments.train --coordinator=host:1234 --process_count=2 --process_index=1

On a cluster that JAX knows (Slurm, Open MPI, a TPU pod) `--distributed` is all it takes.
"""

import json
import os
import sys

from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from qkv_jax.training import processes
from qkv_jax.training.run_directory import config_to_json, differing_fields, flat_fields

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "run as one of several processes, which the environment describes: "
    "Slurm, Open MPI, a TPU pod, or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT, JAX_PROCESS_INDEX",
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; implies --distributed"
)
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "how many processes", lower_bound=1)
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "of this one, from 0", lower_bound=0)
JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)


def join() -> None:
    """Waits for the other processes, if there are any; from then on only the first one prints.

    Raises:
      ValueError: a flag, or a variable of the environment, is wrong or missing.
    """
    several = (COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value) != (None,) * 3
    if not (DISTRIBUTED.value or several):
        return
    processes.join(
        COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _number(PROCESS_COUNT.value, "JAX_PROCESS_COUNT"),
        _number(PROCESS_INDEX.value, "JAX_PROCESS_INDEX"),
        timeout=JOIN_TIMEOUT.value,
        fail=cli.fail,
    )
    if not processes.is_first():
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print, too


def _number(flag: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if flag is not None or text is None:
        return flag
    if not text.isdecimal():
        raise ValueError(f"{variable}: wanted an integer, got {text!r}")
    return int(text)


def check_equal(config: ConfigDict, **others: str | None) -> None:
    """Raises a ValueError, on every process, where they are not to do the same.

    Args:
      config: which has to be equal, all of it.
      **others: texts that have to be, by what they are called.
    """
    mine = {
        f"config.{name}": value for name, value in flat_fields(json.loads(config_to_json(config)))
    }
    first, *rest = processes.gather(mine | others)
    for index, values in enumerate(rest, start=1):
        if found := differing_fields(first, values, "of process 0", f"of process {index}"):
            raise ValueError(f"the processes were started differently: {'; '.join(found)}")
