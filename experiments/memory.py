"""How much memory a script has used."""

import resource
import sys

import jax


def peak_memory() -> int:
    """The most bytes that this process has used: on its first accelerator, or of a CPU's memory."""
    on_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if on_device is not None:
        return int(on_device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
