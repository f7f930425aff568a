"""Models whose layers are looked at without loading them, whether they lie in a file, several files or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.building import meta_model
from library.families.shared.finding import family_of
from library.families.shared.reading import meta_model_of_folder
from library.families.shared.recognition import read_json
from library.model_tools.model_layers import open_model_file
from library.model_tools.weights import WeightFile
from library.options.base import build_options
from library.registry import groups_for
from library.types import Models
from networks.targets import rows_of, weight_shape

if TYPE_CHECKING:
    from library.types import LoraTarget

_LEVEL = "text_model."  # of some versions of transformers' names
_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


class ModelSource(Protocol):
    """Layers of a model that is not loaded. Weights are read one at a time."""

    family: str

    @property
    def targets(self) -> list[LoraTarget]: ...

    def rows(self, target: LoraTarget) -> list[int]: ...

    def shape(self, target: LoraTarget) -> torch.Size: ...

    def weight(self, target: LoraTarget) -> Tensor: ...


def open_sources(model: str, encoders: Mapping[str, str]) -> list[ModelSource]:
    """A model's file or Diffusers folder, and files of its text encoders.

    Args: encoders: files by names of text encoders, "te1" and so on.
    Raises: UserError: missing, broken, no model, or a text encoder that its family has not.
    """
    if Path(model).is_dir():
        whole: ModelSource = ModelFolder(model)
    else:
        whole = open_model_file(model, FAMILIES)
    known = FAMILIES[whole.family].traits.text_encoders
    wrong = [file for part, file in encoders.items() if part not in known]
    if wrong:
        raise UserError(f"{wrong[0]}: {FAMILIES[whole.family].traits.label} has no such text encoder")
    return [*(open_model_file(file, [whole.family], encoder=part) for part, file in encoders.items()), whole]


def targets_of(family: str, models: Models) -> list[LoraTarget]:
    """Every layer of these models that a network may adapt."""
    return FAMILIES[family].adapter(build_options(groups_for(family, "network"), {})).targets.lora(models)


class ModelFolder:
    """A Diffusers folder. Raises: UserError: of no family that is known, or its configuration is broken."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.family = family_of(path)
        self._folders = FAMILIES[self.family].folders
        parts = {part: self._meta(name) for part, name in self._folders.items() if (self.path / name).is_dir()}
        if "denoiser" not in parts:
            raise UserError(f"{path}: has no folder {self._folders['denoiser']}")
        denoiser = parts.pop("denoiser")
        self._models = Models(denoiser, parts, {}, None)
        self._files: dict[str, WeightFile] = {}

    @cached_property
    def targets(self) -> list[LoraTarget]:
        return targets_of(self.family, self._models)

    def rows(self, target: LoraTarget) -> list[int]:
        return rows_of(self._models, target)

    def shape(self, target: LoraTarget) -> torch.Size:
        return weight_shape(self._models, target)

    def weight(self, target: LoraTarget) -> Tensor:
        """Float32: rows over all modules of the layer, in the order of network files.

        Raises: UserError: the folder lacks one of them.
        """
        if target.part not in self._files:
            self._files[target.part] = WeightFile(self.path / self._folders[target.part])
        file = self._files[target.part]
        rows = []
        for name in (f"{module}.weight" for module in target.modules):
            names = (name, _LEVEL + name, name.removeprefix(_LEVEL))
            stored = next((known for known in names if known in file.weights), None)
            if stored is None:
                raise UserError(f"{file.path}: lacks the tensor {name}")
            rows.append(file.read(stored, torch.float32))
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return whole.roll(len(whole) // 2, 0) if target.swap_halves else whole

    def _meta(self, folder: str) -> nn.Module:
        """The part in a sub-folder, without weights."""
        import diffusers
        import transformers

        config = read_json(self.path / folder / "config.json")
        if "_class_name" in config:
            kind = getattr(diffusers, str(config["_class_name"]), None)
            if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
                raise UserError(f"{self.path / folder}: a {config['_class_name']} is not known here")
            return meta_model_of_folder(kind, str(self.path), folder)
        names = config.get("architectures") or [None]
        if names[0] not in _ENCODERS:
            raise UserError(f"{self.path / folder}: a {names[0]} is not known here as a text encoder")
        model = getattr(transformers, names[0])
        return meta_model(lambda: model(model.config_class.from_dict(config)))
