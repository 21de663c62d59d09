"""Shakespeare's characters at the size of `shakespeare_char_cpu`, as fast as a CPU learns them.

    make train ARGS="--config=configs/shakespeare_char_fast.py"

The text: see `shakespeare_char_cpu.py`. Rotary positions, QK-norm, squared ReLU, zero-initialised
outputs, an untied head with a soft cap, and Muon. Reached on two CPU cores: 1.6479 over 20 batches
in 58 s, 1.6559 over the full validation text; 1.874 after 26 s, compilation included.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "shakespeare_char_fast"
    config.data.corpus = "text_file"
    config.data.path = "data/tinyshakespeare.txt"
    config.data.context = 64
    config.optimizer.update(learning_rate=3e-2, warmup_steps=5)
    config.train.update(num_steps=580, batch_size=24, eval_every=290, save_every=0)
    return config
