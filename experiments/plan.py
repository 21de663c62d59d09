"""What a run takes on devices that need not be there: memory, messages, time. It computes nothing.

    python -m experiments.plan --config=configs/lm_1b.py --vocab_size=50257 --devices=8
    python -m experiments.plan --config=configs/lm_1b.py --vocab_size=50257 --devices=256 \
        --chip=v5p --config.mesh.tensor=4
    python -m experiments.plan --config=configs/char_lm.py --vocab_size=96 --devices=8 --check

No corpus is read: where a corpus decides how many ids there are, `--vocab_size` says so. Times are
as the chips' data sheets have them: each kernel takes as long as its products or its memory traffic
do, and messages travel after all of them, or meanwhile. Real kernels miss the peak, and a compiler
may fuse more than is assumed here: an estimate, and no bound.

`--check` compiles the step for as many devices made of this machine's CPU, and compares bytes; in
float32 and without `train.remat`, as a CPU's compiler computes bfloat16 in float32, and computes
again what it was told to, but early.
"""

import sys

import jax
from absl import flags

from experiments import cli, setup
from experiments.abstract_step import vocab_size_of
from experiments.plan_tables import checked, planned
from qkv_jax.training.chips import CHIPS

CONFIG = cli.config_flag()
flags.declare_key_flag("config")  # so that --help shows it
DEVICES = flags.DEFINE_integer("devices", 1, "how many there would be", lower_bound=1)
CHIP = flags.DEFINE_enum("chip", None, sorted(CHIPS), "which; default: all that are known")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "ids of the tokenizer", lower_bound=1)
CHECK = flags.DEFINE_bool("check", False, "compile it for a CPU's devices, and compare")


def main(_) -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: whatever there is stays free
    with cli.one_sentence():
        settings = setup.resolve(CONFIG.value)
        vocab_size = vocab_size_of(settings.data, VOCAB_SIZE.value)
        if CHECK.value:
            cli.use_cpu_devices(DEVICES.value)
            print(checked(settings, vocab_size, DEVICES.value))
        else:
            chips = [CHIP.value] if CHIP.value else list(CHIPS)
            print(planned(settings, vocab_size, DEVICES.value, chips))


if __name__ == "__main__":
    sys.exit(cli.run(main))
