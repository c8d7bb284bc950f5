"""A model's stored weights by name, one at a time: no model is built."""

from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from loralab.errors import ModelError
from loralab.models.quiet import quiet
from loralab.models.resolve import check_weights, model_folder


class StoredWeights:
    """The safetensors files of the model `name` (a catalogue name, a folder, a hub id).

    Tensors are read when asked for, in the dtype they are stored in. Raises `ModelError` where
    there is no such model or its files are not whole.
    """

    def __init__(self, name: str | Path) -> None:
        self.folder = model_folder(str(name))
        check_weights(self.folder)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file it is in."""
        found: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self.files)

    @property
    def num_bytes(self) -> int:
        """What the files hold, headers included."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def find(self, parameter: str) -> str | None:
        """The stored name of a model's parameter.

        A model with a head names its base's parameters with a prefix that the base's own folder
        need not have (`bert.encoder...`, `encoder...`), and the other way about.
        """
        parts = parameter.split(".")
        for start in range(len(parts) - 1):
            name = ".".join(parts[start:])
            if name in self.files:
                return name
        longer = [name for name in self.files if name.endswith("." + parameter)]
        return longer[0] if len(longer) == 1 else None

    def read(self, parameter: str) -> Tensor | None:
        """The parameter's tensor; None where the files have none (tied weights, new heads)."""
        name = self.find(parameter)
        if name is None:
            return None
        with safe_open(self.files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def structure(self) -> nn.Module:
        """The model that the folder's config names, on the meta device: modules without weights."""
        try:
            with quiet(), torch.device("meta"):
                config = transformers.AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, local_files_only=True
                )
                name = (config.architectures or ["AutoModel"])[0]
                return getattr(transformers, name)(config)
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(
                f"{self.folder}: its config.json names no model that can be built ({error})",
                "give a folder that transformers has saved.",
            ) from error
