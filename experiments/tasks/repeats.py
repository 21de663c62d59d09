"""Noise that repeats itself, and which heads find out."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from experiments.tasks.generated import GeneratedTask, where
from qkv_jax import data, nn, training
from qkv_jax.data.batches import Batch
from qkv_jax.models import attention_maps, measures


class Repeats(GeneratedTask):
    """Random tokens, again and again: `qkv_jax.data.repeats`."""

    rows = staticmethod(data.repeats)
    rule = "Each row repeats random tokens; at every token, say the next one."

    @property
    def sizes(self) -> str:
        return f"{self.settings.data.context} tokens that repeat after a quarter to a half of them"

    def make_probe(self, graphdef: nnx.GraphDef) -> Callable[[nn.Params], dict[str, float]]:
        """Loss on new and on repeated tokens; two scores of each head.

        `loss_new` and `loss_repeated`, nats; for head h of layer l, both from 1,
        `prefix_matching_l.h` and `previous_token_l.h`, as `qkv_jax.models.measures` says.
        """
        return self._probe(graphdef, list(self.eval_batches()))

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        probe = self._probe(graphdef, self.test_batches())
        return super().measure(graphdef, params) | probe(params)

    def _probe(
        self, graphdef: nnx.GraphDef, batches: Sequence[Batch]
    ) -> Callable[[nn.Params], dict[str, float]]:
        eval_step = training.make_eval_step(graphdef, self.predict)
        parts = {
            "loss_new": [where(batch, batch["distances"] == 0) for batch in batches],
            "loss_repeated": [where(batch, batch["distances"] > 0) for batch in batches],
        }

        @jax.jit
        def heads(params: nn.Params, tokens: jax.Array) -> dict[str, jax.Array]:
            maps = attention_maps(nn.merge(graphdef, params), tokens)
            return {
                "prefix_matching": measures.prefix_matching(maps, tokens),
                "previous_token": measures.previous_token(maps),
            }

        def probe(params: nn.Params) -> dict[str, float]:
            scores = {
                name: training.mean_metrics(eval_step, params, part)["loss"]
                for name, part in parts.items()
            }
            for name, values in jax.device_get(heads(params, batches[0]["inputs"])).items():
                for layer, row in enumerate(values, start=1):
                    for head, value in enumerate(row, start=1):
                        scores[f"{name}_{layer}.{head}"] = float(value)
            return scores

        return probe
