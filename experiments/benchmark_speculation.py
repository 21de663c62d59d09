"""What a draft model is worth, by how many tokens it drafts: the share that is accepted, and time.

    python -m experiments.benchmark_speculation --workdir=runs/char_lm --draft=runs/small

takes the flags of `experiments.generate`, `--num_samples` texts of `--num_tokens` at once, and
times `generate` and `speculate` in turn, `--rounds` times.
"""

import sys

import jax
import numpy as np

from experiments import cli, generate, setup
from experiments.benchmark_attention import ROUNDS
from experiments.benchmark_sides import Side, in_turn
from experiments.benchmark_table import figure
from qkv_jax import inference

DRAFTED = (1, 2, 4, 8)


def main(_) -> None:
    with cli.one_sentence():
        if generate.DRAFT.value is None:
            raise ValueError("draft: wanted a run, got none")
        trained = setup.load_run(generate.WORKDIR.value)
        draft = generate.load_draft(trained)
    prompt = trained.task.tokenizer.encode(generate.PROMPT.value).astype(np.int32)[None]
    prompt = np.repeat(prompt, generate.NUM_SAMPLES.value, axis=0)
    settings = {
        "num_tokens": generate.NUM_TOKENS.value, "context": trained.settings.data.context,
        "rng": jax.random.key(generate.SEED.value), "temperature": generate.TEMPERATURE.value,
    }  # fmt: skip
    models = trained.graphdef, trained.params, draft.graphdef, draft.params

    def plain() -> jax.Array:
        return jax.block_until_ready(inference.generate(*models[:2], prompt, **settings))

    def drafted(number: int) -> Side:
        def run() -> inference.Speculation:
            return jax.block_until_ready(
                inference.speculate(*models, prompt, num_drafted=number, **settings)
            )

        return Side(run, lambda found: [np.asarray(found.tokens)])

    sides = {number: drafted(number) for number in DRAFTED}
    plainly = Side(plain, lambda found: [np.asarray(found)])
    times = in_turn({"0": plainly} | {str(n): side for n, side in sides.items()}, ROUNDS.value)
    speeds = {n: prompt.shape[0] * settings["num_tokens"] / np.median(times[n]) for n in times}
    print("| drafted | accepted | tokens per pass | tokens/s |\n|---|---:|---:|---:|")
    print(f"| none | | 1 | {figure(speeds['0'] * 1000)} |")
    for number, side in sides.items():
        _, written, passes, proposed, accepted = (np.sum(x) for x in side.run())
        print(
            f"| {number} | {accepted / proposed:.0%} | {written / passes:.2f} "
            f"| {figure(speeds[str(number)] * 1000)} |"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
