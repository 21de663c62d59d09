"""From a config to text, model and run: a user's mistake is one sentence, found before any work."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from configs import char_lm
from experiments import cli, setup
from experiments.text import Text, keep_text, load_text
from qkv_jax import nn, training
from qkv_jax.data import CharTokenizer
from qkv_jax.models import Decoder, MaskedLanguageModel
from qkv_jax.ops.mesh import AXES
from qkv_jax.training import sharding
from qkv_jax.training.run_directory import open_run
from tests.experiments.runs import assert_one_sentence, files_of, saved_steps

SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_layers": 1}


def make_config(corpus, fields=()) -> ConfigDict:
    """The default config on a text file, with some other `fields`: their values by dotted name."""
    config = char_lm.get_config()
    config.data.update(corpus="text_file", path=str(corpus), context=13)
    config.model.update(width=128, num_heads=4, position="rotary")
    config.update_from_flattened_dict(dict(fields))
    return config


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("The cat sat on the mat, and the mat lay still. " * 11)
    return path


def sentence(capsys, do) -> str:
    """What a script prints where `do` raises, after "error: "."""
    with pytest.raises(SystemExit) as ended, cli.one_sentence():
        do()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ")


WRONG_FIELDS = [
    ({"model.width": 37, "model.num_heads": 3}, ["model.num_heads", "model.width = 37", "got 3"]),
    ({"model.num_kv_heads": 3}, ["model.num_kv_heads", "model.num_heads = 4", "got 3"]),
    ({"model.head_dim": 7}, ["rotary", "even model.head_dim", "7"]),
    ({"model.width": 17, "model.num_heads": 1, "model.position": "sinusoidal"}, ["width", "even"]),
    ({"model.num_kv_heads": 2, "model.share_qk": True}, ["model.share_qk", "got 2"]),
    ({"model.heads_per_layer": ((4, 4),)}, ["model.heads_per_layer", "each of 4 layers", "(4, 4)"]),
    ({"model.mixer": "attn"}, ["model.mixer", "'attention'", "got 'attn'"]),
    ({"model.activation": "swish"}, ["model.activation", "'swiglu'", "got 'swish'"]),
    ({"model.norm": "batch"}, ["model.norm", "'rms'", "got 'batch'"]),
    ({"model.norm_position": "mid"}, ["model.norm_position", "'mid'"]),
    ({"model.position": "rope"}, ["model.position", "'rotary'", "got 'rope'"]),
    ({"model.rotary_base": 0.5}, ["model.rotary_base", "0.5"]),
    ({"model.dropout_rate": 1.0}, ["model.dropout_rate", "1.0"]),
    ({"model.logit_softcap": -1.0}, ["model.logit_softcap", "-1.0"]),
    ({"model.num_layers": 0}, ["model.num_layers", "got 0"]),
    ({"model.width": -8}, ["model.width", "got -8"]),
    ({"model.mlp_width": -8}, ["model.mlp_width", "got -8"]),
    ({"optimizer.name": "sgd"}, ["optimizer.name", "'muon'", "got 'sgd'"]),
    ({"optimizer.schedule": "cos"}, ["optimizer.schedule", "'cosine'", "got 'cos'"]),
    ({"optimizer.learning_rate": float("nan")}, ["config.optimizer.learning_rate", "nan"]),
    ({"optimizer.learning_rate": float("inf")}, ["config.optimizer.learning_rate", "inf"]),
    ({"optimizer.learning_rate": 1e39}, ["config.optimizer.learning_rate", "float32", "1e+39"]),
    ({"optimizer.learning_rate": -1e-3}, ["optimizer.learning_rate", "-0.001"]),
    ({"optimizer.learning_rate": 0.0}, ["optimizer.learning_rate", "0.0"]),
    ({"optimizer.clip_norm": -1.0}, ["optimizer.clip_norm", "-1.0"]),
    ({"optimizer.b1": 1.0}, ["optimizer.b1", "1.0"]),
    ({"optimizer.final_fraction": 1.5}, ["optimizer.final_fraction", "1.5"]),
    ({"optimizer.warmup_steps": -1}, ["optimizer.warmup_steps", "-1"]),
    ({"optimizer.accumulate": 0}, ["optimizer.accumulate", "0"]),
    ({"train.num_steps": 0}, ["config.train.num_steps", "got 0"]),
    ({"train.num_steps": -5}, ["config.train.num_steps", "got -5"]),
    ({"train.batch_size": -1}, ["config.train.batch_size", "got -1"]),
    ({"train.eval_batches": 0}, ["config.train.eval_batches", "got 0"]),
    ({"train.save_every": -1}, ["config.train.save_every", "got -1"]),
    ({"train.keep": 0}, ["config.train.keep", "got 0"]),
    ({"train.keep_every": -1}, ["config.train.keep_every", "got -1"]),
    ({"train.save_minutes": -0.5}, ["config.train.save_minutes", "got -0.5"]),
    ({"train.spike_factor": 1.0}, ["config.train.spike_factor", "> 1, or 0", "got 1.0"]),
    ({"train.steps_per_dispatch": 0}, ["config.train.steps_per_dispatch", "got 0"]),
    ({"train.cpu_devices": 0}, ["config.train.cpu_devices", "got 0"]),
    ({"train.sample_tokens": 0}, ["config.train.sample_tokens", "got 0"]),
    ({"train.compute_dtype": "float16"}, ["config.train.compute_dtype", "wanted", "'float16'"]),
    ({"data.context": 0}, ["config.data.context", "got 0"]),
    ({"data.vocab_size": -3}, ["config.data.vocab_size", "got -3"]),
    ({"data.validation_fraction": 0.0}, ["config.data.validation_fraction", "0.0"]),
    ({"data.validation_fraction": 1.0}, ["config.data.validation_fraction", "1.0"]),
    ({"data.validation_fraction": -0.1}, ["config.data.validation_fraction", "-0.1"]),
    ({"data.validation_fraction": float("nan")}, ["config.data.validation_fraction", "nan"]),
    ({"data.mask_rate": 0.3}, ["config.data.mask_rate", "0.3", "'causal_lm'", "masked_lm"]),
    ({"task": "masked_lm", "data.mask_rate": 0.0}, ["config.data.mask_rate", "(0, 1)", "0.0"]),
    ({"task": "masked_lm", "data.mask_rate": 1.0}, ["config.data.mask_rate", "(0, 1)", "1.0"]),
    ({"task": "mlm"}, ["config.task", "causal_lm", "masked_lm", "got 'mlm'"]),
    ({"model.mixer": "linformer"}, ["model.mixer", "'linformer'", "no decoder can use it"]),
    ({"task": "masked_lm", "model.mixer": "lstm"}, ["model.mixer", "'lstm'", "no encoder can"]),
    ({"seed": -1}, ["config.seed", "got -1"]),
    ({"name": ""}, ["config.name", "got ''"]),
    ({"name": "../elsewhere"}, ["config.name", "'../elsewhere'"]),
]  # fmt: skip


@pytest.mark.parametrize("fields, words", WRONG_FIELDS, ids=[str(f) for f, _ in WRONG_FIELDS])
def test_a_wrong_field_is_named_with_what_came_and_what_was_wanted(capsys, corpus, fields, words):
    said = sentence(capsys, lambda: setup.resolve(make_config(corpus, fields)))
    assert all(word in said for word in words), said


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    "sizes, fields, words",
    [
        ((1, 1, 3, 1), {}, ["config.model.num_heads", "config.mesh.tensor = 3", "got 4"]),
        ((1, 1, 1, 2), {}, ["config.data.context", "config.mesh.context = 2", "got 13"]),
        (
            (1, 1, 1, 4),
            {"mesh.zigzag": True, "data.context": 12},
            ["config.data.context", "2 x config.mesh.context = 8", "config.mesh.zigzag", "got 12"],
        ),
        (
            (1, 1, 1, 1),
            {"mesh.zigzag": True, "model.mixer": "attention,delta"},
            ["config.model.mixer", "by their positions", "zigzag", "got 'attention,delta'"],
        ),
        (
            (1, 1, 1, 1),
            {"mesh.zigzag": True, "task": "masked_lm"},
            ["config.mesh.zigzag", "wanted False", "MaskedLanguageModel is no decoder"],
        ),
    ],
)
def test_a_mesh_that_does_not_suit_the_model_or_its_tokens_is_named(
    capsys, corpus, monkeypatch, sizes, fields, words
):
    settings = setup.resolve(make_config(corpus, fields))
    monkeypatch.setattr(sharding, "make_mesh", lambda *args, **kwargs: abstract_mesh(*sizes))
    said = sentence(capsys, lambda: setup.make_mesh(settings))
    assert all(word in said for word in words), said


def test_a_mesh_that_does_not_divide_the_devices_is_named(capsys, corpus):
    settings = setup.resolve(make_config(corpus, {"mesh.fsdp": 16, "mesh.data": 1}))
    said = sentence(capsys, lambda: setup.make_mesh(settings))
    assert "config.mesh: data=1, fsdp=16" in said and "config.train.cpu_devices" in said


def test_the_docs_show_the_plan_of_the_default_config():
    settings = setup.resolve(char_lm.get_config())
    _, state = setup.abstract_state(settings, vocab_size=96)
    optimizer = training.make_optimizer(settings.optimizer, settings.train.num_steps)
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    assert sharding.plan(state.params, optimizer, abstract_mesh(2, 2, 2, 1)) in page


def test_a_field_that_a_config_file_misspells_is_named(capsys, corpus):
    config = make_config(corpus)
    config.train.num_stps = 7
    assert "no field config.train.num_stps" in sentence(capsys, lambda: setup.resolve(config))


@pytest.mark.parametrize(
    "fields, content, words",
    [
        ({"data.corpus": "wikipedia"}, "text", ["corpus 'wikipedia'", "python_docs, text_file"]),
        ({"data.tokenizer": "words"}, "text" * 99, ["tokenizer 'words'", "char, byte, bpe"]),
        ({"data.corpus": "python_docs"}, "text", ["python_docs", "takes no path"]),
        ({}, None, ["corpus.txt", "does not exist"]),
        ({}, "", ["corpus.txt", "is empty"]),
        ({}, "binary \0 text", ["corpus.txt", "binary", "byte 7"]),
        ({}, b"\xff\xfe latin", ["corpus.txt", "not UTF-8"]),
        ({}, "short", ["5 tokens", "at least 14"]),
        ({"data.context": 99}, "w" * 500, ["at least 100", "context 99"]),
        ({"data.tokenizer": "bpe", "data.tokenizer_path": "nowhere.json"}, "t" * 999,
         ["nowhere.json", "No such file"]),
        ({"data.tokenizer_path": "any.json"}, "t" * 999, ["tokenizer 'char' takes no path"]),
    ],
)  # fmt: skip
def test_a_wrong_text_is_named_with_what_is_wrong(capsys, corpus, fields, content, words):
    corpus.unlink()
    if content is not None:
        corpus.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = setup.resolve(make_config(corpus, fields))
    said = sentence(capsys, lambda: load_text(settings.data))
    assert all(word in said for word in words), said


def test_a_vocabulary_smaller_than_the_texts_names_what_it_lacks(capsys, corpus):
    settings = setup.resolve(make_config(corpus))
    said = sentence(capsys, lambda: load_text(settings.data, CharTokenizer("The cat sat")))
    assert "'o'" in said, said


COMMAND_LINES = [
    (["--config.train.num_stps=3"], ["'num_stps'", '"num_steps"']),
    (["--config.trian.num_steps=3"], ["'trian'", '"train"']),
    (["--workdri=runs/x"], ["workdri"]),
    (["--config.train.num_steps=many"], ["config.train.num_steps", "many"]),
    (["--config.train.batch_size=1.5"], ["config.train.batch_size", "1.5"]),
    (["--config=nowhere.py"], ["nowhere.py", "No such file"]),
    (["train"], ["unexpected argument 'train'"]),
    (["--profile=1400:1600"], ["profile", "<= 1500", "'1400:1600'"]),
]


@pytest.mark.parametrize("flags, words", COMMAND_LINES, ids=[f[0] for f, _ in COMMAND_LINES])
def test_a_wrong_command_line_ends_in_one_sentence(scripts, tmp_path, flags, words):
    done = scripts.run("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert_one_sentence(done, *words)
    assert done.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        (["optimizer.learning_rate=nan"], ["config.optimizer.learning_rate", "nan"]),
        # What the config lets pass and the module does not:
        (["model.mixer=differential", "model.num_kv_heads=1"], ["num_kv_heads", "pairs", "got 1"]),
    ],
)
def test_a_wrong_field_leaves_no_directory_behind(scripts, tmp_path, fields, words):
    done = scripts.train(tmp_path / "run", *fields)
    assert_one_sentence(done, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_place_of_the_run_directory_ends_in_one_sentence(scripts, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    done = scripts.train(tmp_path / place)
    assert_one_sentence(done, "workdir", str(tmp_path / place))
    assert (tmp_path / "file").read_text() == "mine"


def test_help_lists_the_flags(scripts):
    done = scripts.run("train", "--help")
    assert "--config:" in done.stdout and "--workdir:" in done.stdout
    assert "python -m experiments.train" in done.stdout


def test_everything_works_in_plain_python_without_flags(corpus):
    config = make_config(corpus, SMALL)
    settings = setup.resolve(config)
    text = load_text(settings.data)
    assert text.tokenizer.decode(np.concatenate([text.train, text.validation])) == (
        corpus.read_text()
    )
    assert text.validation_characters == len(text.validation)
    vocab_size = text.tokenizer.vocab_size
    graphdef, params = setup.make_model(settings, vocab_size)
    logits = nn.merge(graphdef, params)(text.train[None, :13].astype(np.int32))
    assert logits.shape == (1, 13, vocab_size)
    assert text.floors["bigram"] < text.floors["unigram"] < text.floors["uniform"]

    optimizer = training.make_optimizer(settings.optimizer, settings.train.num_steps)
    state = training.TrainState.create(params, optimizer)
    abstract_graphdef, abstract = setup.abstract_state(settings, vocab_size)
    assert abstract_graphdef == graphdef
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, abstract))
    assert described[0] == described[1]


def test_the_task_decides_the_model_which_knows_one_id_more_where_tokens_are_masked(corpus):
    known = len(set(corpus.read_text()))

    def model_of(task):
        settings = setup.resolve(make_config(corpus, SMALL | {"task": task}))
        graphdef, state = setup.abstract_state(settings, settings.task(settings).vocab_size)
        return settings, nn.merge(graphdef, state.params)

    settings, causal = model_of("causal_lm")
    assert isinstance(causal, Decoder) and causal.config.vocab_size == known
    _, masked = model_of("masked_lm")
    assert isinstance(masked, MaskedLanguageModel) and masked.config.vocab_size == known + 1
    for config in (causal.config, masked.config):
        assert config.context == settings.data.context == 13
        read = [name for name in settings.model if hasattr(config, name)]
        assert {"width", "num_layers", "mixer"} <= set(read)
        assert all(getattr(config, name) == settings.model[name] for name in read)


def test_the_seed_makes_the_parameters(corpus):
    def parameters(seed):
        settings = setup.resolve(make_config(corpus, SMALL | {"seed": seed}))
        return jax.tree.leaves(setup.make_model(settings, 11)[1])

    same = [np.array_equal(a, b) for a, b in zip(parameters(3), parameters(3), strict=True)]
    other = [np.array_equal(a, b) for a, b in zip(parameters(3), parameters(4), strict=True)]
    assert all(same) and not all(other)


def test_a_run_is_bound_to_its_text_and_tokenizer(capsys, corpus, tmp_path):
    config = make_config(corpus)
    text = load_text(setup.resolve(config).data)
    run = open_run(tmp_path / "run", config)
    keep_text(run, text)
    before = files_of(run.path)
    keep_text(run, text)  # the same again

    corpus.write_text("Another text, of the same name. " * 17)
    other = load_text(setup.resolve(config).data)
    said = sentence(capsys, lambda: keep_text(run, other))
    assert "another text" in said and text.corpus.sha256[:12] in said

    retrained = Text(text.corpus, CharTokenizer("xyz"), text.train, text.validation)
    assert "another tokenizer" in sentence(capsys, lambda: keep_text(run, retrained))
    assert files_of(run.path) == before

    (run.path / "corpus.json").write_text('{"sha')
    assert "corpus.json is damaged" in sentence(capsys, lambda: keep_text(run, text))


def test_a_trained_run_is_read_back_and_not_changed(finished):
    before = files_of(finished)
    trained = setup.load_run(str(finished))
    assert (trained.step, trained.settings.train.num_steps) == (20, 20)
    assert trained.settings.model["width"] == 16
    _, leaves = training.load_checkpoint(finished / "checkpoints")
    np.testing.assert_array_equal(trained.params["head"]["kernel"], leaves["params/head/kernel"])
    assert files_of(finished) == before and saved_steps(finished) == [15, 20]


def test_a_directory_without_a_run_or_a_checkpoint_is_named(capsys, corpus, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    said = sentence(capsys, lambda: setup.load_run(nowhere))
    assert nowhere in said and "train one there first" in said

    config = make_config(corpus)
    run = open_run(tmp_path / "run", config)
    keep_text(run, load_text(setup.resolve(config).data))
    assert "there is no checkpoint" in sentence(capsys, lambda: setup.load_run(str(run.path)))

    run.tokenizer.write_text(json.dumps({"tokenizer": "char"}))
    assert "tokenizer.json" in sentence(capsys, lambda: setup.load_run(str(run.path)))
    run.config.write_text("{}")
    assert "config.name is missing" in sentence(capsys, lambda: setup.load_run(str(run.path)))
