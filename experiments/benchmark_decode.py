"""`python -m experiments.benchmark decode`: tokens one by one, beside transformers and nanoGPT.

    --rounds=3                  how often each side is timed, in turn with the others
    --quick                     small sizes, to see whether it works
    --nanogpt=../nanoGPT        a checkout of karpathy/nanoGPT

GPT-2 of 124 million parameters, drawn at random by transformers and read by `interop.load`: the
likeliest tokens of both sides are compared before they are timed. Without transformers ours is
timed alone, and so without the checkout of nanoGPT, whose parameters are read likewise.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import benchmark_nanogpt as nanogpt
from experiments.benchmark_attention import QUICK, ROUNDS
from experiments.benchmark_cases import Bench
from experiments.benchmark_sides import ABSENT, Side
from experiments.benchmark_table import Ratio, Row, Section, figure, made_with, summary, write_both
from qkv_jax import inference, interop, nn
from qkv_jax.inference.decoding import packed, unpacked
from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.ops.cache import Cache, CacheKind, QuantizedCache

PROMPT, NEW = 64, 128  # tokens
GPT2 = DecoderConfig(
    vocab_size=50_257, context=1024, num_layers=12, width=768, num_heads=12, activation="gelu_tanh"
)
SMALL = dataclasses.replace(GPT2, vocab_size=503, num_layers=2, width=48, num_heads=4)
# What the peer reached when this was planned, in tokens a second, and what ours should.
TARGETS = {1: 65 / 30, 8: 250 / 108}
PREFILL_TARGET = 1.7 / 1.0


def benchmark_decode(out: Path) -> None:
    """Measures case by case; writes `out` as .md and .json after each of them."""
    sections: list[Section] = []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pair(SMALL if QUICK.value else GPT2, Path(folder))
        for name, (title, about, rows) in CASES.items():
            bench = Bench(ROUNDS.value)
            found = list(rows(bench, ours, theirs))
            sections.append(Section(name, title, about, found, bench.notes))
            print("\n".join(sections[-1].lines()), flush=True)
            write(out, sections)
    print(f"{summary(sections)}\nwritten: {out}.md")


def pair(config: DecoderConfig, folder: Path) -> tuple[interop.Checkpoint, object | None]:
    """A model of ours and the same of transformers, if that is installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return interop.of_model("gpt2", Decoder(config, rngs=nnx.Rngs(0))), None
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context, n_embd=config.width,
            n_layer=config.num_layers, n_head=config.num_heads, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder)
    return interop.load(folder), theirs


# --- The cases ------------------------------------------------------------------------------------


def gpt2(bench: Bench, ours: interop.Checkpoint, theirs: object | None) -> Iterator[Row]:
    for B in (1, 8):
        prompt = np.random.default_rng(0).integers(1, ours.config.vocab_size, (B, PROMPT))
        sides = {
            "transformers": ABSENT if theirs is None else their_text(theirs, prompt),
            "ours": our_text(ours, prompt, Cache),
            "int8 cache": our_text(ours, prompt, QuantizedCache),
        }
        if theirs is not None:
            wanted, found = sides["transformers"].answer()[0], sides["ours"].answer()[0]
            if not np.array_equal(wanted, found):
                raise ValueError("the likeliest tokens of ours and of transformers differ")
        row = bench.row(f"batch {B}", sides, [Ratio("transformers", "ours", TARGETS[B])])
        row = per_token(row, NEW)
        if B == 1:
            size = sum(x.nbytes for x in jax.tree.leaves(ours.params)) / 1e9
            bench.notes.append(
                f"A token of batch 1 reads all parameters, {figure(size)} GB: ours "
                f"{figure(size / row.median('ours') * 1e3)} GB/s. A sum over 1 GB read "
                f"{figure(read_speed())} GB/s in the same run."
            )
        yield row


def read_speed() -> float:
    """GB/s at which this machine reads an array of 1 GB: the best of five sums."""
    x = jnp.ones((4, 2**26), jnp.float32)
    total = jax.jit(lambda x: x.sum(1))
    total(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / 1e9 / min(seconds)


def our_text(ours: interop.Checkpoint, prompt: np.ndarray, kind: CacheKind) -> Side:
    def run() -> jax.Array:
        return jax.block_until_ready(
            inference.generate(
                ours.graphdef, ours.params, prompt, num_tokens=NEW, context=ours.config.context,
                rng=jax.random.key(0), top_k=1, kind=kind,
            )
        )  # fmt: skip

    return Side(run, lambda found: [np.asarray(found)])


def their_text(theirs: object, prompt: np.ndarray) -> Side:
    import torch

    tokens = torch.from_numpy(prompt)

    def run() -> object:
        return theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW,
            min_new_tokens=NEW, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return Side(run, lambda found: [found[:, prompt.shape[1] :].numpy()])


def prefill(bench: Bench, ours: interop.Checkpoint, theirs: object | None) -> Iterator[Row]:
    length = ours.config.context
    tokens = np.random.default_rng(0).integers(1, ours.config.vocab_size, (1, length))

    @jax.jit
    def read(params, tokens):
        model = nn.merge(ours.graphdef, params)
        cache = model.init_cache(1, length)
        x, cache = model.extend(tokens, cache, positions=jnp.arange(length))
        return model.logits(x[:, -1:]), cache

    sides: dict[str, Side | str] = {"transformers": ABSENT}
    if theirs is not None:
        import torch

        theirs_tokens = torch.from_numpy(tokens)

        def their_read() -> object:
            with torch.no_grad():
                return theirs(theirs_tokens, use_cache=True, logits_to_keep=1)

        sides["transformers"] = Side(their_read, lambda found: [found.logits.numpy()])
    sides["ours"] = Side(
        lambda: jax.block_until_ready(read(ours.params, tokens)),
        lambda found: [np.asarray(found[0])],
    )
    ratio = Ratio("transformers", "ours", PREFILL_TARGET)
    yield bench.row(f"{length:,} tokens", sides, [ratio])


def shakespeare(bench: Bench, ours: interop.Checkpoint, theirs: object | None) -> Iterator[Row]:
    del ours, theirs
    number, new = (2, 100) if QUICK.value else (10, 500)
    prompt = np.zeros((number, 1), np.int32)
    sides: dict[str, Side | str] = {"nanoGPT": "not named"}
    if nanogpt.NANOGPT.value is None:
        config = DecoderConfig(
            vocab_size=65, context=64, num_layers=4, width=128, num_heads=4, activation="gelu"
        )
        model = interop.of_model("gpt2", Decoder(config, rngs=nnx.Rngs(0)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            peer, model = nanogpt.small_model(Path(folder))
        likeliest = nanogpt.sampler(peer, prompt[:1], max_new_tokens=63, top_k=1)()
        found = our_samples(model, prompt[:1], 63, top_k=1).answer()[0]
        if not np.array_equal(likeliest, found):
            raise ValueError("the likeliest tokens of ours and of nanoGPT differ")
        run = nanogpt.sampler(peer, prompt, max_new_tokens=new, temperature=0.8, top_k=200)
        sides["nanoGPT"] = Side(run, lambda found: [found])
    sides["ours"] = our_samples(model, prompt, new, temperature=0.8, top_k=65)
    yield bench.row(f"{number} x {new} tokens", sides, [Ratio("nanoGPT", "ours", 10)])


def our_samples(model: interop.Checkpoint, prompt: np.ndarray, new: int, **sampling: float) -> Side:
    def run() -> jax.Array:
        return jax.block_until_ready(
            inference.generate(
                model.graphdef, model.params, prompt, num_tokens=new, context=64,
                rng=jax.random.key(0), **sampling,
            )
        )  # fmt: skip

    return Side(run, lambda found: [np.asarray(found)])


def length(bench: Bench, ours: interop.Checkpoint, theirs: object | None) -> Iterator[Row]:
    del ours, theirs
    short, long, steps = (64, 256, 8) if QUICK.value else (1024, 16_384, 64)
    for mixer, settings in (
        ("attention", {}), ("sliding_window", {"window": 256}), ("gated_delta", {}),
    ):  # fmt: skip
        config = DecoderConfig(
            vocab_size=64, context=long, num_layers=4, width=256, num_heads=4, position="none",
            use_bias=False, norm="rms", mixer=mixer, **settings,
        )  # fmt: skip
        graphdef, params = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
        sides = {
            f"after {after:,}": steps_after(graphdef, params, after, steps)
            for after in (short, long)
        }
        target = None if mixer == "attention" else 1.1
        ratio = Ratio(f"after {long:,}", f"after {short:,}", target, at_least=False)
        yield per_token(bench.row(mixer, sides, [ratio]), steps)


def steps_after(graphdef: nnx.GraphDef, params: nn.Params, after: int, steps: int) -> Side:
    """So many tokens one by one, in a cache with room for them after `after` others."""

    @jax.jit
    def run(params, token):
        model = nn.merge(graphdef, params)

        empty = model.init_cache(1, after + steps)

        def step(i, carry):
            token, cache = carry
            x, cache = model.extend(token, unpacked(cache, empty), positions=(after + i)[None])
            token = jnp.argmax(model.logits(x), -1).astype(jnp.int32)
            return token, packed(cache)

        return jax.lax.fori_loop(0, steps, step, (token, packed(empty)))[0]

    token = jnp.zeros((1, 1), jnp.int32)
    return Side(lambda: jax.block_until_ready(run(params, token)), lambda found: [found])


def cache_bytes(bench: Bench, ours: interop.Checkpoint, theirs: object | None) -> Iterator[Row]:
    del bench, theirs
    model = ours.model
    sizes = {
        name: [sum(cache.nbytes for cache in model.init_cache(1, 1024, kind=kind)) / 1e6]
        for name, kind in (("float32", Cache), ("int8", QuantizedCache))
    }
    ratio = Ratio("int8", "float32", 0.27, at_least=False)
    yield Row("1,024 tokens of GPT-2", sizes, (ratio,), unit="MB")


CASES: dict[str, tuple[str, str, Callable[..., Iterator[Row]]]] = {
    "gpt2": (
        "GPT-2, 124 million parameters, token by token",
        f"float32, the likeliest tokens: a prompt of {PROMPT}, then {NEW} more. Milliseconds for "
        "each token of the batch's rows together, the prompt's reading included.",
        gpt2,
    ),
    "prefill": (
        "Reading a prompt",
        "The same model, batch 1: all caches, and the last token's logits.",
        prefill,
    ),
    "shakespeare": (
        "Texts of Shakespeare's characters",
        "nanoGPT's small model (4 layers, width 128, 64 tokens of context) and its `sample.py`: "
        "one text after another, the last 64 tokens read anew for each token, temperature 0.8, "
        "all 65 characters in the draw. Ours draws the texts together, from a cache that is "
        "refilled from its last half. At random parameters.",
        shakespeare,
    ),
    "length": (
        "A token after a long text",
        "A decoder of 4 layers, width 256, with room for that many tokens.",
        length,
    ),
    "bytes": ("The cache in int8", "Keys and values of all layers.", cache_bytes),
}  # fmt: skip


def per_token(row: Row, tokens: int) -> Row:
    """A row whose times are those of one token."""
    values = {
        name: times if isinstance(times, str) else [time / tokens for time in times]
        for name, times in row.values.items()
    }
    return dataclasses.replace(row, values=values, unit="ms a token")


def write(out: Path, sections: list[Section]) -> None:
    """The table as Markdown, and all the timings as JSON."""
    made = made_with()
    rates = [
        f"{row.what}, {side}: {figure(1e3 * int(row.what.split()[-1]) / row.median(side))}"
        for section in sections[:1]
        for row in section.rows
        for side in row.values
        if row.median(side)
    ]
    lines = [
        "# Decoding, beside transformers and nanoGPT", "",
        f"`python -m experiments.benchmark decode --rounds={ROUNDS.value}"
        f"{' --nanogpt=<checkout>' if nanogpt.NANOGPT.value else ''}"
        f"{' --quick' if QUICK.value else ''}`", "",
        *(["**Small sizes: a smoke test. The figures mean nothing.**", ""] * bool(QUICK.value)),
        summary(sections), "",
        f"Tokens a second: {'; '.join(rates)}.", "",
        "The sides are timed in turn; figures are medians over rounds, quotients medians of the "
        "quotients within a round. Compilation is not timed.", "",
        *(line for section in sections for line in section.lines()),
        "## Made with", "", *(f"- {name}: {value}" for name, value in made.items()), "",
    ]  # fmt: skip
    record = {"sections": [dataclasses.asdict(s) for s in sections], "made_with": made}
    write_both(out, "\n".join(lines), record)
