"""What all tests share: a CPU of several devices, and little optimisation where it is asked for."""

import os
from importlib.metadata import version

import jax

# Before any test starts a backend. What does not ask for devices runs on the first, as ever.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes most of the tests' time, and half of that with one module of code each program,
# and fusions without the emitters through MLIR.
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters, nor the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":  # as `make test` sets it
    # What the tests start, and the processes that share their work, inherit it.
    os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")])
