"""Shakespeare's characters at the size of `shakespeare_char_cpu`, as fast as a CPU learns them."""

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
