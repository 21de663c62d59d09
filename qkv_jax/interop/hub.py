"""Checkpoints by their names on the Hugging Face hub: downloaded once, then read from its cache."""

import re
from pathlib import Path

from qkv_jax.data.pretrained import TOKENIZER_FILES
from qkv_jax.interop.checkpoint import CONFIG
from qkv_jax.interop.tensors import INDEX, WHOLE

# All that is downloaded: data, never pickles or code, and weights once where a repository has them
# in several forms. The parts are called as transformers calls them.
FILES = (CONFIG, WHOLE, INDEX, "model-*-of-*.safetensors", *TOKENIZER_FILES)

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)


def folder_of(source: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, one of the hub downloaded into its cache.

    Where a local path has the name, it is meant. What is in the cache already is not downloaded
    again; with HF_HUB_OFFLINE=1, or without a network, the cache alone is read. A gated repository
    needs the token that `hf auth login` keeps.

    Args:
      source: a folder, or `owner/name` on the hub with an optional `@revision`: a branch, a tag or
        a commit.

    Returns:
      a folder that `load` reads.

    Raises:
      ValueError: there is neither, nobody may read it, it has no safetensors, or the hub cannot be
        reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    found = _NAME.fullmatch(str(source))
    if found is None:
        raise ValueError(
            f"checkpoint: wanted a folder, or owner/name on the Hugging Face hub, got {source!r}"
        )
    folder = _download(found["name"], found["revision"])
    if not (folder / WHOLE).exists() and not (folder / INDEX).exists():
        raise ValueError(
            f"checkpoint: {source} on the hub has no {WHOLE}; weights in another form, such as "
            "pickles, are not read"
        )
    return folder


def _download(name: str, revision: str | None) -> Path:
    """The folder in the cache of a repository's `FILES`."""
    # Imported here because it takes a quarter of a second, which most starts do not need.
    from huggingface_hub import constants, errors, is_offline_mode, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"checkpoint: {name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then "
            "log in by `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"checkpoint: {name} is neither a folder here nor a repository on the hub that you may "
            "read"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"checkpoint: {name} on the hub has no revision {revision!r}") from error
    except (OSError, errors.HTTPError) as error:
        why = str(error).splitlines()[0].removeprefix("Got: ")  # no network, no space, a busy hub
        if is_offline_mode():
            why = "HF_HUB_OFFLINE is set, and not all of it is in the cache"
        raise ValueError(
            f"checkpoint: {name} is no folder here and could not be downloaded: {why}"
        ) from error
