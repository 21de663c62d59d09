"""A hybrid: three layers of gated DeltaNet, whose state does not grow, and one of attention.

    python -m experiments.train --config=configs/hybrid.py

The setting of configs/char_lm.py with another pattern of mixers. Reached on two CPU cores: 1.2763
nats per character over the full validation text (char_lm.py: 1.2923), in 507 s on a machine that
takes 332 s for char_lm.py.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "hybrid"
    config.model.mixer = "gated_delta,gated_delta,gated_delta,attention"
    return config
