"""What every script's command line does: flags, and one clear sentence for a user's mistake."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from qkv_jax.training import CheckpointError, LossSpikeError, processes

USER_ERROR = 2  # the exit status, as for a misspelt flag
INTERRUPTED = 130  # what shells report after Ctrl-C


_failing = threading.Lock()
USER_ERRORS = (
    ValueError, CheckpointError, LossSpikeError, FloatingPointError, ImportError, OSError,
)  # fmt: skip


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with the error's message alone, where the user can mend the cause.

    Around what reads a user's input; a bug elsewhere keeps its traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        fail(_sentence(error))
    except jax.errors.JaxRuntimeError as error:
        if processes.count() == 1:
            raise
        fail(
            "a computation of several processes failed, as it does when one of them ends "
            f"({str(error).splitlines()[0]}); what was saved is kept, and the same commands go on"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """`one_sentence` that ends every process where one of them fails, and waits for all."""
    said = ""
    try:
        yield
    except USER_ERRORS as error:
        said = _sentence(error)
    if first := next(filter(None, processes.gather(said)), None):
        fail(first)


def _sentence(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    # For a missing config file, "[Errno 2] ..." ends an account of where it was looked for.
    reason = str(error).rpartition("] ")[2]
    return f"{error.filename}: {error.strerror}" if error.filename else reason


def fail(message: str) -> NoReturn:
    """Prints the message and exits with the status of a user's mistake.

    A process of several tells the others, and ends without waiting for them.
    """
    several = jax.distributed.is_initialized()
    if several:
        _failing.acquire()  # of two threads the first one speaks
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    if several:
        processes.announce(message)
        sys.stdout.flush()
        os._exit(USER_ERROR)
    sys.exit(USER_ERROR)


def config_flag(default: str | None = "configs/char_lm.py") -> flags.FlagHolder:
    """The flag `--config`, a Python file whose fields `--config.field=value` overrides.

    A misspelt field ends the program here: the overrides are applied where the flag is defined.
    """
    try:
        return config_flags.DEFINE_config_file(
            "config", default, "the experiment: a Python file, which is executed"
        )
    except (AttributeError, KeyError) as error:
        while isinstance(error.args[0], Exception):
            error = error.args[0]
        hint = str(error.args[0]).replace("\nDid you mean", "; did you mean")
        fail(f"the config has no such field: {hint}")


def run(main: Callable[[Sequence[str]], None], *, positional: bool = False) -> None:
    """`app.run`, with the same one sentence for flags that do not parse.

    Args:
      main: gets what is left of the command line, the program's name first.
      positional: whether there may be anything left but that name.
    """
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which accelerators it did not find
    jax.config.parse_flags_with_absl()
    try:
        app.run(main, flags_parser=functools.partial(_parse_flags, positional=positional))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # sys.exit may crash while XLA still compiles


def _parse_flags(argv: Sequence[str], *, positional: bool) -> list[str]:
    with _flag_errors():
        rest = flags.FLAGS(list(argv))
    if len(rest) > 1 and not positional:
        fail(f"unexpected argument {rest[1]!r}; flags start with -- (see --help)")
    return rest


@contextlib.contextmanager
def _flag_errors() -> Iterator[None]:
    try:
        yield
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        fail(str(message))


def use_cpu_devices(number: int) -> None:
    """Makes `number` devices of the CPU; a batch is shared among them. For CPUs alone."""
    if jax.config.jax_num_cpu_devices in (-1, None) and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", number)
