"""A checkpoint's name is a folder, or a repository of the hub, of which data alone is fetched."""

import fnmatch
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from qkv_jax import interop

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Calls of `snapshot_download`, which copies what is asked for of `files`, or fails."""

    class Hub:
        files, error, asked = GOOD, None, ()

        def snapshot_download(self, name, *, revision, allow_patterns):
            self.asked = name, revision
            if self.error is not None:
                raise self.error
            folder = tmp_path / "snapshot"
            folder.mkdir()
            for file in self.files:
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).write_text(file)
            return str(folder)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)  # as make test sets it
    return hub


def refusal(kind):
    """An error as the hub's answers cause it."""
    request = httpx2.Request("GET", "https://huggingface.co/api/models/owner/name")
    response = httpx2.Response(401, request=request)
    return kind("401 Client Error.\n\nRepository Not Found.", response=response)


def test_a_folder_is_taken_as_it_is_whatever_it_is_called(tmp_path, monkeypatch, hub):
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert interop.folder_of("owner/name").samefile(tmp_path / "owner/name")
    assert interop.folder_of(tmp_path) == tmp_path
    assert hub.asked == ()


@pytest.mark.parametrize(("source", "asked"), [
    ("owner/name", ("owner/name", None)),
    ("tohoku-nlp/bert_v3.1@refs/pr/7", ("tohoku-nlp/bert_v3.1", "refs/pr/7")),
], ids=str)  # fmt: skip
def test_a_name_is_downloaded_at_its_revision(hub, source, asked):
    folder = interop.folder_of(source)
    assert hub.asked == asked
    assert sorted(path.name for path in folder.iterdir()) == sorted(GOOD)


def test_weights_and_tokenizers_are_downloaded_and_no_pickles_and_no_code(hub):
    wanted = {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
    }  # fmt: skip
    hub.files = wanted | {
        "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "modeling_own.py", "weights.pt",
        "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "README.md",
        "onnx/config.json", "training_args.bin", "rust_model.ot", "x.pkl", "tokenization_own.py",
    }  # fmt: skip
    folder = interop.folder_of("owner/name")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == wanted


def test_a_repository_of_pickles_is_refused(hub):
    hub.files = ("config.json", "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"owner/name .* no model\.safetensors.* pickles"):
        interop.folder_of("owner/name")


@pytest.mark.parametrize(("error", "words"), [
    (refusal(errors.RepositoryNotFoundError), "neither a folder here nor a repository"),
    (refusal(errors.GatedRepoError), "gated: accept its terms at https://.*/owner/name"),
    (refusal(errors.RevisionNotFoundError), "has no revision 'v2'"),
    (refusal(errors.HfHubHTTPError), r"could not be downloaded: 401 Client Error\.$"),
    (errors.LocalEntryNotFoundError("Got: ConnectError: no route\nlong"),
     "could not be downloaded: ConnectError: no route$"),
    (httpx2.ProxyError("407"), "could not be downloaded: 407$"),
    (OSError(28, "No space left on device"), "could not be downloaded: .*No space left"),
], ids=lambda case: type(case).__name__)  # fmt: skip
def test_what_the_hub_refuses_is_said_in_one_sentence(hub, error, words):
    hub.error = error
    with pytest.raises(ValueError, match=f"^checkpoint: owner/name .*{words}"):
        interop.folder_of("owner/name@v2")


@pytest.mark.parametrize(
    "source", ["gpt2", "a/b/c", "./owner/name", "/owner/name", "o/n@", "o/n m"]
)
def test_what_is_no_name_is_not_asked_for(hub, source):
    with pytest.raises(ValueError, match="wanted a folder, or owner/name"):
        interop.folder_of(source)
    assert hub.asked == ()


def of_cache(cache, source):
    """What a process without a network prints for a source."""
    code = f"from qkv_jax import interop\ntry: print(interop.folder_of({source!r}))\n"
    code += "except ValueError as error: print(error)"
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_network_what_is_in_the_librarys_cache_is_found(tmp_path):
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for file in GOOD:
        (folder / file).write_text(file)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for source in ("owner/name", f"owner/name@{COMMIT}"):
        assert of_cache(tmp_path, source) == str(folder)
    assert "owner/other is no folder here" in (said := of_cache(tmp_path, "owner/other"))
    assert said.endswith("HF_HUB_OFFLINE is set, and not all of it is in the cache")


def test_the_hubs_library_is_imported_where_something_is_downloaded():
    code = "import sys; from qkv_jax import interop; interop.folder_of('.'); "
    code += "assert 'huggingface_hub' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
