"""A model's name -> a whole local folder in transformers' format, or an error that says why not.

A name is, in this order, a catalogue name, a local folder, or a hub id.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loralab.catalogue import ENTRIES, MADE, fetch
from loralab.errors import ModelError, nearest
from loralab.models.convert import converted_folder
from loralab.models.hub import HUB_ID, PICKLES, hub_folder, pickle_error
from loralab.models.presets import PRESETS

_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # of a pipeline's part, such as unet/


def model_folder(name: str) -> Path:
    """The local folder of the model called `name`; fetched or converted first where needed.

    Raises `ModelError` for a name that leads nowhere, `FetchError` where a catalogue model
    cannot be brought here. The folder is not yet checked: see `check_weights`.
    """
    if name in ENTRIES:
        return _catalogue_folder(name)
    if name in MADE:
        raise ModelError(
            f"{name!r} is an image model, and this reads text",
            "set model.task to 'image'; `loralab train digits-styles` shows how.",
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        raise ModelError(
            f"{name} is a file; a model is a folder with config.json and safetensors files",
            f"give the folder: {path.parent}",
        )
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no model folder {name}",
            "check the path; or give a catalogue name "
            f"({', '.join(_catalogue_models())}) or a hub id such as org/name.",
        )
    return hub_folder(name, advice=_advice(name))


def check_weights(folder: Path) -> None:
    """Raises `ModelError` that lists every weight file of `folder` that is missing or damaged."""
    singles = [folder / name for name in ("model.safetensors", _DIFFUSERS_FILE)]
    single = next((file for file in singles if file.is_file()), None)
    index = folder / "model.safetensors.index.json"
    if single is not None:
        files = [single]
    elif index.is_file():
        files = _indexed_files(index)
    else:
        raise _without_safetensors(folder)
    faults = [fault for file in files if (fault := _fault(file))]
    if faults:
        raise ModelError(
            f"{folder}: the weights are not whole: " + "; ".join(faults),
            "copy or download the model again.",
        )


def _catalogue_models() -> list[str]:
    return sorted(name for name, entry in ENTRIES.items() if entry.kind == "model")


def _catalogue_folder(name: str) -> Path:
    entry = ENTRIES[name]
    if entry.kind != "model":
        raise ModelError(
            f"{name!r} is a data set of the catalogue, not a model",
            f"give one of its models: {', '.join(_catalogue_models())}.",
        )
    return converted_folder(name) if entry.main.endswith(".gguf") else fetch(name)


def _advice(name: str) -> str:
    if name in PRESETS:
        return (
            f"{name!r} is a preset: facts about sizes for plans, without weights. To load the "
            "model give its hub id or a local folder."
        )
    return f"catalogue models: {nearest(name, _catalogue_models())}"


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} is an adapter, not a model",
            "give the base model's name here and load the adapter onto it.",
        )
    inner = sorted(str(found.parent) for found in path.glob("*/config.json"))
    raise ModelError(
        f"{path} has no config.json, so it is no model folder",
        f"did you mean {inner[0]}?" if inner else "give a folder that transformers has saved.",
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is damaged: {error!r}", "copy or download the model again."
        ) from error
    return [index.parent / shard for shard in sorted(shards)]


def _fault(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        with safe_open(file, framework="numpy"):
            return None
    except SafetensorError as error:
        return f"{file.name} is truncated or no safetensors file ({error})"


def _without_safetensors(folder: Path) -> ModelError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return pickle_error(str(folder), pickles)
    return ModelError(
        f"{folder} has a config.json but no model.safetensors",
        "copy the weights there too, or download the model again.",
    )
