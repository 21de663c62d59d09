"""A hybrid: three layers of gated DeltaNet, whose state does not grow, and one of attention.

    python -m experiments.train --config=configs/hybrid.py

The setting of configs/char_lm.py with another pattern of mixers.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "hybrid"
    config.model.mixer = "gated_delta,gated_delta,gated_delta,attention"
    return config
