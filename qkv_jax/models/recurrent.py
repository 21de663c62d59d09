"""Recurrent sequence to sequence: an LSTM or GRU encoder, a decoder with or without attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.blocks import dropout_rngs
from qkv_jax.models.config import check_dropout_and_dtype, check_sizes, one_of
from qkv_jax.models.seq2seq import Seq2Seq
from qkv_jax.nn.additive import KINDS
from qkv_jax.nn.recurrent import LSTMCell
from qkv_jax.ops.masks import Lengths

CELLS = {"lstm": LSTMCell, "gru": nnx.GRUCell}
ATTENTIONS = ("none", "bahdanau", "luong")

# What the encoder hands on: outputs [B, S, D], and the last state of each layer.
Memory = tuple[jax.Array, list[Any]]


@dataclasses.dataclass(frozen=True)
class RecurrentSeq2SeqConfig:
    """Everything that determines a recurrent encoder-decoder.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    vocab_size: int  # V
    source_vocab_size: int | None = None  # None: source and target share vocabulary and embeddings
    num_layers: int = 1  # of the encoder and of the decoder
    width: int = 128  # D, of embeddings and states
    cell: str = "lstm"
    bidirectional: bool = True  # half of the encoder's width reads backwards
    attention: str = "bahdanau"
    score: str = "general"  # of "luong": dot, general or concat
    input_feeding: bool = False  # of "luong": the cell also reads the last attentional vector
    dropout_rate: float = 0.0
    dtype: str = "float32"  # of the computation; parameters and states are float32

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "source_vocab_size", "num_layers", "width")
        check_dropout_and_dtype(self)
        one_of("cell", self.cell, CELLS)
        one_of("attention", self.attention, ATTENTIONS)
        one_of("score", self.score, KINDS)
        if self.bidirectional and self.width % 2:
            raise ValueError(
                f"model.width: two directions need an even one, got model.width = {self.width}"
            )
        for name, default in (("score", "general"), ("input_feeding", False)):
            value = getattr(self, name)
            if value != default and self.attention != "luong":
                raise ValueError(
                    f"model.{name}: {value!r} was set, but only model.attention = 'luong' reads "
                    f"it, got {self.attention!r}"
                )


class RecurrentSeq2Seq(Seq2Seq):
    """Source and target ids in, logits of the next target tokens out, by recurrence.

        m[1..S], state = encoder(x[1..S])         m[s] = [forward[s]; backward[s]] or forward[s]

        "none"      state, h = cell(state, y)
        "bahdanau"  state, h = cell(state, [y; attend(h of the last step)])
        "luong"     state, h = cell(state, y)     or [y; r of the last step], input feeding
                    r = tanh(attend(h) + W h)

        logits = W_out h, for "luong" W_out r

    with `attend(q) = W_c sum over s of a[s] v[s]`, where a = softmax over s of a score of q and
    m[s]; of one head. "none": Sutskever et al. 2014, arxiv.org/abs/1409.3215, the encoder's last
    state is all that the decoder knows. "bahdanau": Bahdanau et al. 2014, arxiv.org/abs/1409.0473,
    `nn.AdditiveAttention`; without the paper's maxout layer before the logits. "luong": Luong et
    al. 2015, arxiv.org/abs/1508.04025, `nn.LuongAttention` with v = m; W_c and W are the two parts
    of the paper's matrix. The decoder begins with the encoder's last states, layer by layer. So a
    bidirectional encoder's directions have half the width each.

    O(S + T) steps, one after another, and O(S T) time for the attention. What the attention needs
    of the source is projected once, before the steps.

    Args:
      config: the sizes and the choices.
      rngs: where the initial parameters come from.
    """

    def __init__(self, config: RecurrentSeq2SeqConfig, *, rngs: nnx.Rngs):
        D, shared = config.width, {"dtype": config.dtype, "rngs": rngs}
        self.config = config

        def cell(inputs: int, outputs: int) -> nnx.RNNCellBase:
            return CELLS[config.cell](inputs, outputs, **shared)

        self.embedding = nnx.Embed(config.vocab_size, D, **shared)
        self.source_embedding = self.embedding
        if config.source_vocab_size is not None:
            self.source_embedding = nnx.Embed(config.source_vocab_size, D, **shared)
        directions = 2 if config.bidirectional else 1
        self.encoder = nnx.List(
            nnx.List(cell(D, D // directions) for _ in range(directions))
            for _ in range(config.num_layers)
        )
        reads_more = config.attention == "bahdanau" or config.input_feeding
        self.decoder = nnx.List(
            cell(2 * D if layer == 0 and reads_more else D, D) for layer in range(config.num_layers)
        )
        self.attention = _make_attention(config, rngs)
        luong = config.attention == "luong"
        self.combine = nn.Linear(D, D, use_bias=False, **shared) if luong else None
        self.head = nn.Linear(D, config.vocab_size, use_bias=False, **shared)

    def encode(
        self,
        source: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> Memory:
        """The outputs [B, S, D], 0 where padded, and the last state of each layer."""
        rngs = dropout_rngs(self.config, rng, self.config.num_layers)
        x, states = self.source_embedding(source), []
        for cells, key in zip(self.encoder, rngs, strict=True):
            x = nn.dropout(x, self.config.dropout_rate, key)
            runs = [
                nn.run(cell, x, lengths=source_lengths, reverse=reverse)
                for cell, reverse in zip(cells, (False, True), strict=False)
            ]
            x, state = jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=-1), *runs)
            states.append(state)
        return x, states

    def decode(
        self,
        target_in: jax.Array,
        memory: Memory,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, float32 [B, T, V], from what `encode` returned; the rest as in a call."""
        first, last = dropout_rngs(self.config, rng, 2)
        y = nn.dropout(self.embedding(target_in), self.config.dropout_rate, first)
        _, out = self._unroll(y, memory, source_lengths)
        out = nn.dropout(out, self.config.dropout_rate, last)
        return self.head(out).astype(jnp.float32)

    def alignment(
        self,
        source: jax.Array,
        target_in: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
    ) -> jax.Array:
        """The weight that each target token's step gives to each source token.

        Bahdanau et al., figure 3. The arguments are those of a call.

        Returns:
          float32 [B, T, S].

        Raises:
          ValueError: the model has no attention.
        """
        if self.attention is None:
            raise ValueError("alignment: wanted a model with attention, got model.attention 'none'")
        memory = self.encode(source, source_lengths=source_lengths)
        queries, _ = self._unroll(self.embedding(target_in), memory, source_lengths)
        outputs = memory[0]
        B, S, _ = outputs.shape
        # Attention to values of which each is a token's own unit vector: the weights.
        units = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, 1, S))
        weights = self._attend(queries, self._project(outputs)[0], units, source_lengths)
        return weights[:, :, 0]

    def _unroll(
        self, y: jax.Array, memory: Memory, source_lengths: int | jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """What each step asks the memory by, and what it hands to the logits, [B, T, D] both."""
        kind = self.config.attention
        outputs, states = memory
        keys, values = (None, None) if kind == "none" else self._project(outputs)

        def context(query: jax.Array) -> jax.Array:
            out = self._attend(query[:, None], keys, values, source_lengths)
            return self.attention.out(out[:, 0, 0])

        def step(carry: Any, y: jax.Array) -> Any:
            states, last = carry
            query = jax.tree.leaves(states[-1])[-1]  # h, of (c, h) or alone
            if kind == "bahdanau":
                y = jnp.concatenate([y, context(query)], axis=-1)
            elif self.config.input_feeding:
                y = jnp.concatenate([y, last], axis=-1)
            new_states = []
            for cell, state in zip(self.decoder, states, strict=True):
                h, state = nn.run(cell, y[:, None], state=state)
                y = h[:, 0]
                new_states.append(state)
            if kind == "luong":
                query, y = y, jnp.tanh(context(y) + self.combine(y))
            return (new_states, y), (query, y)

        first = states, jnp.zeros_like(y[:, 0])
        _, (queries, out) = jax.lax.scan(step, first, jnp.swapaxes(y, 0, 1))
        return jnp.swapaxes(queries, 0, 1), jnp.swapaxes(out, 0, 1)

    def _project(self, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The memory's keys and values, [B, S, 1, D], with no query in the place of the queries."""
        _, keys, values = self.attention.project(outputs[:, :0], outputs)
        return keys, values

    def _attend(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        source_lengths: int | jax.Array | None,
    ) -> jax.Array:
        """The weighted sums, [B, T, 1, width of the values], that x, [B, T, D], asks for."""
        query, _, _ = self.attention.project(x, x[:, :0])
        return self.attention.attend(
            x, query, keys, values,
            mask=None if source_lengths is None else Lengths(source_lengths),
            score=None, q_positions=None, kv_positions=None, dropout_rate=0.0, dropout_rng=None,
        )  # fmt: skip


def _make_attention(config: RecurrentSeq2SeqConfig, rngs: nnx.Rngs) -> nn.MultiHeadAttention | None:
    if config.attention == "none":
        return None
    if config.attention == "bahdanau":
        return nn.AdditiveAttention(config.width, 1, dtype=config.dtype, rngs=rngs)
    # The values are the memory itself, and so are the keys, but for "concat".
    return nn.LuongAttention(
        config.width, 1, kind=config.score, share_kv=config.score != "concat",
        dtype=config.dtype, rngs=rngs,
    )  # fmt: skip
