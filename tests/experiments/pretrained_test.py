"""Runs become folders of Hugging Face's, and such folders are evaluated and looked into."""

import re
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from experiments import setup
from qkv_jax import interop
from qkv_jax.models import EncoderConfig, MaskedLanguageModel
from tests.experiments.runs import WORDS, assert_one_sentence
from tests.pages import data_of

GPT2 = (
    "model.norm=layer", "model.position=learned", "model.activation=gelu_tanh",
    "model.use_bias=True", "model.qk_norm=False", "model.tie_embeddings=True",
    "model.zero_init_outputs=False", "model.logit_softcap=0.0", "data.tokenizer=bpe",
    "data.vocab_size=260",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(scripts, tmp_path_factory):
    """A GPT-2 of ours."""
    workdir = tmp_path_factory.mktemp("gpt2") / "run"
    done = scripts.train(workdir, *GPT2)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def folder(scripts, run):
    """The same as Hugging Face has it."""
    out = run.parent / "folder"
    done = scripts.run("convert", f"--workdir={run}", "--architecture=gpt2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "config.json, model.safetensors, tokenizer.json" in done.stdout
    return out


def test_a_converted_run_has_its_parameters(run, folder):
    trained = setup.load_run(str(run))
    loaded = interop.load(folder)
    assert loaded.architecture.model_type == "gpt2"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)


def test_its_loss_is_the_runs_where_nothing_overlaps(scripts, folder, run, tmp_path):
    text = tmp_path / "text.txt"
    context = setup.load_run(str(run)).settings.data.context
    text.write_text("the cat sat on a mat and the dog ran " * 3, encoding="utf-8")
    done = scripts.run("evaluate", f"--checkpoint={folder}", f"--text={text}")
    assert done.returncode == 0, done.stderr
    found = float(re.search(r"\n\| (\d+\.\d+) \|", done.stdout).group(1))
    of_run = scripts.run("evaluate", f"--workdir={run}", f"--text={text}")
    whole = float(re.search(r"\| model \| (\d+\.\d+)", of_run.stdout).group(1))
    assert f"windows of {context} that overlap" in done.stdout
    assert found == pytest.approx(whole, rel=0.2)  # each token has more before it


def test_a_page_shows_it(scripts, folder, tmp_path):
    page = tmp_path / "page.html"
    done = scripts.run(
        "visualize", f"--checkpoint={folder}", "--text=the cat sat", "--worst=2", f"--out={page}"
    )
    assert done.returncode == 0, done.stderr
    data = data_of(page.read_text(encoding="utf-8"))
    assert "".join(data["views"][0]["queries"]) == "the cat sat"
    assert "a gpt2 model" in data["about"] and len(data["tables"]) == 2


def test_a_name_of_the_hub_is_read_from_its_cache(scripts, folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--owner--tiny.v1"
    shutil.copytree(folder, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    page = tmp_path / "page.html"
    done = scripts.run("visualize", "--checkpoint=owner/tiny.v1", "--text=the cat", f"--out={page}")
    assert done.returncode == 0, done.stderr
    assert "Attention of tiny.v1" in page.read_text(encoding="utf-8")
    done = scripts.run("convert", "--checkpoint=owner/tiny.v1", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    done = scripts.run("evaluate", "--checkpoint=owner/huge", "--text=x")
    assert_one_sentence(done, "owner/huge", "could not be downloaded: HF_HUB_OFFLINE is set")


def test_a_folder_is_written_in_another_precision(scripts, folder, tmp_path):
    done = scripts.run(
        "convert", f"--checkpoint={folder}", "--dtype=bfloat16", f"--out={tmp_path / 'half'}"
    )
    assert done.returncode == 0, done.stderr
    whole, half = (interop.load(path).params for path in (folder, tmp_path / "half"))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16"), y.astype("bfloat16")),
        whole, half,
    )  # fmt: skip
    assert (tmp_path / "half/tokenizer.json").exists()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT that has learnt nothing, with its words."""
    marks = ["[CLS]", "[SEP]", "[UNK]", "[HIDDEN]"]
    words = {word: i for i, word in enumerate([*marks, *sorted(set(WORDS.split()))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.add_special_tokens(marks)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    config = EncoderConfig(
        len(words), context=12, num_layers=1, width=8, num_heads=2, norm_epsilon=1e-12
    )
    folder = tmp_path_factory.mktemp("bert")
    model = MaskedLanguageModel(config, rngs=nnx.Rngs(0))
    interop.save(folder, interop.of_model("bert", model))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_bert_is_evaluated_on_hidden_tokens_and_says_what_it_expects_there(
    scripts, bert, tmp_path
):
    (tmp_path / "text.txt").write_text(f"{WORDS} " * 3)
    evaluate = ("evaluate", f"--checkpoint={bert}", f"--text={tmp_path / 'text.txt'}")
    assert_one_sentence(scripts.run(*evaluate), str(bert), "no mask token")
    settings = bert / "tokenizer_config.json"
    settings.write_text('{"mask_token": {"content": "[HIDDEN]", "lstrip": true}}')
    done, again = scripts.run(*evaluate), scripts.run(*evaluate)
    assert done.returncode == 0 and done.stdout == again.stdout, done.stderr
    assert "51 tokens, in windows of 12 with 15% of them hidden" in done.stdout
    names, _, values = done.stdout.splitlines()[2:]
    assert names.startswith("| nats per hidden token | perplexity per hidden token | accuracy |")
    loss, _, _, hidden = map(float, values.strip("| ").split(" | "))
    assert loss == pytest.approx(np.log(20), abs=0.2) and hidden == 11  # 2 of 10, and of the last 1

    page = tmp_path / "page.html"
    text = "--text=the [HIDDEN] sat"
    done = scripts.run("visualize", f"--checkpoint={bert}", text, f"--out={page}")
    assert done.returncode == 0, done.stderr
    shown = data_of(page.read_text(encoding="utf-8"))
    assert shown["views"][0]["queries"] == ["[CLS]", "the", "[HIDDEN]", "sat", "[SEP]"]
    assert [table["tokens"] for table in shown["tables"]] == [[2]]

    settings.write_text("[]")
    assert_one_sentence(scripts.run(*evaluate), str(settings), "JSON object")


@pytest.mark.parametrize(("script", "flags", "words"), [
    ("convert", ["--workdir={run}", "--architecture=llama", "--out={tmp}/x"],
     ["model.", "'llama' has"]),
    ("convert", ["--workdir={run}", "--out={tmp}/x"], ["architecture", "got none"]),
    ("convert", ["--checkpoint={folder}", "--out={folder}"], ["out", "another folder"]),
    ("convert", ["--checkpoint={folder}"], ["out", "got none"]),
    ("convert", ["--out={tmp}/x"], ["either --workdir or --checkpoint"]),
    ("evaluate", ["--checkpoint={folder}"], ["text", "got none"]),
    ("evaluate", ["--checkpoint={run}", "--text=x"], ["model_type"]),
    ("visualize", ["--checkpoint={folder}"], ["text", "at least one character"]),
    ("visualize", ["--checkpoint={folder}", "--workdir={run}", "--text=a"], ["got both"]),
], ids=str)  # fmt: skip
def test_what_cannot_be_done_ends_in_one_sentence(
    scripts, run, folder, tmp_path, script, flags, words
):
    places = {"run": run, "folder": folder, "tmp": tmp_path}
    assert_one_sentence(scripts.run(script, *(flag.format(**places) for flag in flags)), *words)
