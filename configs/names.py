"""A model that makes up names, one a line.

    make train ARGS="--config=configs/names.py --config.data.path=names.txt"

The text: `names.txt` of karpathy/makemore (32,033 names), or any list with one entry a line.
Reached on two CPU cores in 193 s: 1.6620 nats per character on the last tenth of the list (bigrams:
2.5774). makemore's published 1.92 is of another split, one name at a time.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "names"
    config.data.corpus = "text_file"
    config.data.path = "data/names.txt"
    config.data.context = 32
    config.model.width = 64
    config.train.update(num_steps=1500, batch_size=64, sample_tokens=200)
    return config
