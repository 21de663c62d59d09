"""How little XLA optimises where `make test` asks for little: compiling takes most of the time."""

import os
from importlib.metadata import version

# One module of code each program, and fusions without the emitters through MLIR: half the time.
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters, nor the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
    # What the tests start, and the processes that share their work, inherit it.
    os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")])
