"""GPT-2's smallest blocks, with what decoders have learned since: RMS norm, rotary, relu^2, ...

    python -m experiments.train --config=configs/gpt2_124m_modern.py --config.data.path=tokens/web
    python -m experiments.plan --config=configs/gpt2_124m_modern.py --vocab_size=50304 --chip=h200
    python -m experiments.benchmark train --config=configs/gpt2_124m_modern.py --vocab_size=50304

The blocks have GPT-2's 85 million parameters, and the data and the optimizer are those of
configs/gpt2_124m.py, whose docstring says how to make `tokens/web`. What differs, in the order of
the records of github.com/KellerJordan/modded-nanogpt: rotary positions, squared ReLU, RMS norms
without biases, normalised queries and keys in 6 heads of 128, an output head of its own, a cap on
the logits. With 50,304 ids these are the 162 million parameters and the 64 x 1024 windows of that
repository's third track, to which tokens a second can be compared. Not yet measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    config = gpt2_124m.get_config()
    config.name = "gpt2_124m_modern"
    config.model.update(
        num_heads=6, activation="relu_squared", norm="rms", position="rotary", qk_norm=True,
        use_bias=False, tie_embeddings=False, zero_init_outputs=True, logit_softcap=15.0,
    )  # fmt: skip
    config.train.batch_size = 64
    config.optimizer.accumulate = 8
    return config
