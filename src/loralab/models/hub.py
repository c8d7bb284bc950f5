"""A hub id -> the local folder of its snapshot, quickly or not at all."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from loralab.errors import FetchError, ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*",)  # other formats and training states lie in subfolders
_PATIENCE_SECONDS = 5.0


def hub_folder(
    name: str,
    *,
    advice: str,
    wanted: Sequence[str] = _WANTED,
    unwanted: Sequence[str] = _UNWANTED,
) -> Path:
    """The snapshot of hub model `name`: downloaded, or the copy in the hub's own cache where the
    hub is out of reach or `HF_HUB_OFFLINE` is set.

    wanted, unwanted: patterns of the files that are fetched; a language model's at its top level.

    Raises `ModelError` (ending in `advice`) where there is no such model, where it is gated, or
    where the hub cannot be reached; `FetchError` where a download breaks off.
    """
    patterns: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(unwanted)}
    if constants.HF_HUB_OFFLINE:
        return _cached(name, "HF_HUB_OFFLINE is set", advice, patterns)
    try:
        info = HfApi().model_info(name, timeout=_PATIENCE_SECONDS)
    except GatedRepoError as error:
        raise _gated(name) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"no model {name!r}: neither in the catalogue, nor a local folder, nor on the hub",
            f"check the name ({advice}); a private model needs a login (`hf auth login`).",
        ) from error
    except Exception as error:  # whatever the hub's HTTP library raises: it changes with versions
        return _cached(name, f"the hub cannot be reached ({error})", advice, patterns)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    _refuse_pickles(name, files, list(filter_repo_objects(files, **patterns)))
    try:
        return Path(
            snapshot_download(name, revision=info.sha, etag_timeout=_PATIENCE_SECONDS, **patterns)
        )
    except GatedRepoError as error:
        raise _gated(name) from error
    except Exception as error:
        raise FetchError(
            f"downloading {name} from the hub broke off: {error}",
            "start the command again: files that are whole are not fetched twice.",
        ) from error


def _cached(name: str, why: str, advice: str, patterns: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True, **patterns))
    except (OSError, HFValidationError) as error:  # OSError: no snapshot, or not a whole one
        raise ModelError(
            f"no model {name!r} here: it is neither in the catalogue, nor a local folder, nor in "
            f"the hub's cache, and {why}",
            f"check the name ({advice}), or get the model on a machine that reaches the hub and "
            "give its folder.",
        ) from error


def _gated(name: str) -> ModelError:
    return ModelError(
        f"{name} is gated: its owner asks you to accept terms first",
        f"accept them at https://huggingface.co/{name}, then log in with `hf auth login`.",
    )


def _refuse_pickles(name: str, files: list[str], wanted: list[str]) -> None:
    pickles = [file for file in files if "/" not in file and file.endswith(PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in wanted):
        raise pickle_error(name, pickles)


def pickle_error(place: str, names: list[str]) -> ModelError:
    """The refusal of weights that only exist as pickles."""
    return ModelError(
        f"{place} holds its weights only as pickles ({', '.join(names)}); reading a pickle can "
        "run any code, so loralab reads safetensors alone",
        "where you trust the files, convert them once: load the model with transformers' "
        "from_pretrained, write it with save_pretrained, and give that folder.",
    )
