"""The translation task: every kind of model trained, resumed, evaluated, used."""

import json

import jax
import numpy as np
import pytest

from experiments import setup
from experiments.attention_views import of_run
from qkv_jax import data, nn, viz
from tests.experiments.runs import (
    TINY,
    assert_one_sentence,
    assert_same_run,
    files_of,
    messages,
    saved_steps,
)

TRANSFORMER_ONLY = (
    "model.num_heads", "model.activation", "model.norm", "model.position", "model.qk_norm",
    "model.use_bias", "model.tie_embeddings", "model.zero_init_outputs", "model.logit_softcap",
)  # fmt: skip
TRANSLATION = ("task=translation", "data.pairs=dates", "data.num_examples=60", "data.context=40")
KINDS = {
    "transformer": (),
    "recurrent": ("model.kind=recurrent", "model.cell=gru"),
    "plain": ("model.kind=recurrent", "model.attention=none"),
    "convolutional": ("model.kind=convolutional", "model.conv_width=3"),
}


def fields_of(kind, *fields):
    """The tiny model's fields, without those that the kind does not read."""
    unread = ("data.corpus", *(TRANSFORMER_ONLY if kind != "transformer" else ()))
    tiny = [field for field in TINY if not field.startswith(unread)]
    return [*tiny, *TRANSLATION, *KINDS[kind], *fields]


def train(scripts, workdir, kind, *fields):
    flags = (f"--config.{field}" for field in fields_of(kind, *fields))
    return scripts.run("train", f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def runs(scripts, tmp_path_factory):
    """A finished run of each kind, trained where it is first asked for."""
    folder, done = tmp_path_factory.mktemp("translation"), {}

    def run(kind):
        if kind not in done:
            done[kind] = train(scripts, folder / kind, kind)
            assert done[kind].returncode == 0, done[kind].stderr
        return folder / kind, done[kind]

    return run


SLOW = ("plain", "convolutional")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_every_kind_of_model_trains_and_says_how_it_translates(runs, kind):
    workdir, done = runs(kind)
    assert messages(done) == [] and saved_steps(workdir) == [15, 20]
    assert "dates in many formats, and in ISO 8601, seed 0; 54 to train on" in done.stdout
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["scores"]) == {"loss", "accuracy", "exact_match"}  # six pairs make no group
    assert (result["state_size"] is not None) == (kind == "transformer")
    report = (workdir / "report.md").read_text()
    assert "20 steps of 4 pairs of sentences of at most 40 tokens" in report
    assert (kind == "plain") == ("no pictures of attention" in report)
    assert (kind != "plain") == (workdir / "figures/alignment_layer_1.png").exists()
    assert (workdir / "sample.txt").read_text().count("\n    ") == 6


@pytest.mark.parametrize("kind", ["transformer", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(runs, scripts, tmp_path, kind):
    constant = ("optimizer.schedule=constant", "optimizer.warmup_steps=0", "train.figures=False")
    whole, part = tmp_path / "whole", tmp_path / "part"
    for workdir, fields in ((whole, ()), (part, ("train.num_steps=14",)), (part, ())):
        done = train(scripts, workdir, kind, *constant, *fields)
        assert done.returncode == 0, done.stderr
    assert "resuming from step 14" in done.stdout
    assert_same_run(part, whole)


def test_evaluating_it_prints_the_same_scores(runs, scripts):
    workdir, _ = runs("recurrent")
    done = scripts.run("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((workdir / "result.json").read_text())["scores"]
    assert f"| all | {scores['exact_match']:.4f} |" in done.stdout
    assert f"a token costs {scores['loss']:.4f} nats" in done.stdout
    other = scripts.run("evaluate", f"--workdir={workdir}", "--text=README.md")
    assert_one_sentence(other, "text", "dates")


def test_it_translates_a_prompt_without_its_data(runs, scripts):
    workdir, _ = runs("recurrent")
    before = files_of(workdir)
    done = scripts.run("generate", f"--workdir={workdir}", "--prompt=4 March 2017")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    trained = setup.load_run(str(workdir))
    (expected,) = trained.task.translate(trained.graphdef, trained.params, "4 March 2017")
    assert done.stdout == expected + "\n" and files_of(workdir) == before
    assert "pairs" not in vars(trained.task)  # nothing was read or generated
    # Draws and beams, of the same model.
    model = trained.graphdef, trained.params, "4 March 2017"
    done = scripts.run(
        "generate", f"--workdir={workdir}", "--prompt=4 March 2017", "--num_samples=3", "--seed=5"
    )
    draws = trained.task.translate(*model, num_samples=3, rng=jax.random.key(5), temperature=0.8)
    assert done.stdout.removesuffix("\n").split("\n" + "-" * 80 + "\n") == draws
    assert len(set(draws)) > 1
    best = trained.task.translate(*model, num_samples=2, beams=2)
    assert len(set(best)) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt=4 March", "--num_tokens=5"], ["num_tokens", "ends by itself"]),
        (["--prompt=4 March", "--beams=2", "--seed=1"], ["seed", "beams draws nothing"]),
        (["--prompt="], ["prompt", "got none"]),
        (["--prompt=#"], ["'#'", "position 0"]),
        ([f"--prompt={'1' * 40}"], ["context is 40", "the prompt"]),
    ],
)
def test_what_cannot_be_translated_ends_in_one_sentence(runs, scripts, flags, words):
    workdir, _ = runs("recurrent")
    assert_one_sentence(scripts.run("generate", f"--workdir={workdir}", *flags), *words)


@pytest.mark.parametrize(("kind", "names"), [
    ("transformer", ["decoder to source", "encoder", "decoder"]),
    ("recurrent", ["decoder to source"]),
])  # fmt: skip
@pytest.mark.parametrize("text", [None, "4 March 2017"])
def test_a_page_shows_what_a_translation_looks_at(runs, kind, names, text):
    workdir, _ = runs(kind)
    looked = of_run(setup.load_run(str(workdir)), text)
    assert [view.name for view in looked.views] == names
    page = viz.attention_page(looked.views, title="translation")
    assert all(name in page for name in names)
    cross = looked.views[0]
    if text is not None:
        assert "".join(cross.keys).replace("end", "") == text
    if kind == "transformer":
        assert looked.views[2].queries == ["begin", *cross.queries[:-1]]
    with pytest.raises(ValueError, match="worst: wanted a model that continues a text"):
        of_run(setup.load_run(str(workdir)), text, worst=1)
    with pytest.raises(ValueError, match="text: wanted a sentence to translate, got none"):
        of_run(setup.load_run(str(workdir)), " ")


def config_with(**fields):
    config = setup.char_lm.get_config()
    config.task = "translation"
    config.update_from_flattened_dict(fields)
    return config


def task_of(**fields):
    settings = setup.resolve(config_with(**fields))
    return settings.task(settings)


@pytest.fixture
def files(tmp_path):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "own", "tail"]
    sentences = [" ".join(words[: 1 + n % 11]) for n in range(60)]
    (tmp_path / "a").write_text("\n".join(sentences))
    (tmp_path / "b").write_text("\n".join(sentence.upper() for sentence in sentences))
    return {"data.pairs": "file", "data.path": f"{tmp_path}/a", "data.target_path": f"{tmp_path}/b"}


def test_of_files_bleu_is_measured_and_by_length_too(files, monkeypatch):
    tested = {
        "data.test_path": files["data.path"],
        "data.test_target_path": files["data.target_path"],
    }
    task = task_of(**files, **tested, **{"data.context": 64})
    train, validation, test = task._parts
    assert (len(train), len(validation), len(test)) == (54, 6, 60)
    graphdef, params = setup.make_model(task.settings, task.vocab_size)
    targets = test.pairs.targets
    monkeypatch.setattr(
        task, "_written", lambda *_: [t if len(t) <= 15 else "THE CAT DID" for t in targets]
    )
    scores = task.measure(graphdef, params)
    right = np.mean([len(target) <= 15 for target in targets])
    assert scores["exact_match"] == pytest.approx(right) and 0 < scores["bleu"] < 100
    assert scores["exact_match_15"] == 1 and scores["bleu_15"] == pytest.approx(100)
    longest = max(int(n.removeprefix("bleu_")) for n in scores if n.startswith("bleu_"))
    assert longest > 15 and scores[f"exact_match_{longest}"] == 0 == round(
        scores[f"bleu_{longest}"]
    )
    said = "\n".join(task.describe(scores))
    assert f"| 11 to 15 tokens | 1.0000 | {scores['bleu_15']:.4f} |" in said
    assert "sacrebleu, tokenizer 13a" in said


def test_the_alignment_is_of_a_pair_with_a_label_for_each_token():
    task = task_of(**{"data.pairs": "dates", "data.num_examples": 60, "data.tokenizer": "char",
                      "model.kind": "recurrent"})  # fmt: skip
    weights, target, source = task.alignment(
        nn.merge(*setup.make_model(task.settings, task.vocab_size))
    )
    assert weights.shape == (1, 1, len(target), len(source)) and len(source) <= 24
    assert target[-1] == source[-1] == "end"
    pairs = data.load_pairs("dates", number=60)
    assert dict(zip(pairs.sources, pairs.targets, strict=True))["".join(source[:-1])] == "".join(
        target[:-1]
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model.kind": "rnn"}, ["config.model.kind", "'recurrent'", "got 'rnn'"]),
        ({"model.kind": "recurrent", "model.num_heads": 2}, ["model.num_heads", "'recurrent'"]),
        ({"model.cell": "gru"}, ["config.model.cell: 'gru'", "'transformer'"]),
        ({"model.kind": "recurrent", "train.remat": True}, ["train.remat", "'recurrent'"]),
        ({"model.encoder_mixer": "attn"}, ["model.encoder_mixer", "'attn'"]),
        ({"task": "causal_lm", "model.kind": "recurrent"}, ["model.kind", "['transformer']"]),
        ({"task": "causal_lm", "data.pairs": "dates"}, ["data.pairs", "translation"]),
        ({"data.mask_rate": 0.5}, ["data.mask_rate", "masked_lm"]),
        ({"data.num_examples": 0}, ["data.num_examples", "got 0"]),
        ({"data.pairs": "pears"}, ["'pears'"]),
        ({"data.bleu_tokenizer": "14a"}, ["data.bleu_tokenizer", "'14a'"]),
        (
            {"data.pairs": "dates", "data.test_target_path": "b"},
            ["test_target_path", "no data.test_path"],
        ),
        ({"data.pairs": "dates", "data.context": 3}, ["context is 3"]),
    ],
)
def test_a_wrong_field_is_named(fields, words):
    with pytest.raises(ValueError) as error:
        print(task_of(**fields).source)
    assert all(word in str(error.value) for word in words), error.value
