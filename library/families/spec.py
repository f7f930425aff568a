"""What the toolkit knows of a model family before anything heavy is imported: one `FamilySpec` per family. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.entry_points import EntryPoint

if TYPE_CHECKING:
    from torch import nn

    from library.checkpoints.layer_names import PartNames
    from library.families.base import Family
    from library.families.shared.file_model import FileModel
    from library.options.base import OptionGroup, Options
    from library.types import FamilyTraits


@dataclass(frozen=True)
class ModelKind:
    """A kind of file or Diffusers folder, and how to recognise it by names alone."""

    label: str  # with its article, for messages: "an SDXL model"
    keys: str  # regular expression that is found in a tensor's name
    pipeline: str | None = None  # how the class name in model_index.json begins; None: no pipeline is this kind alone
    options: Mapping[str, object] = field(
        default_factory=dict, hash=False
    )  # of its family, that go with every such model
    unsupported: tuple[tuple[str, str], ...] = ()  # (regular expression for names, why such a file cannot be used)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """All that a model family offers. Fields without a default are what every family must have.

    Raises: TypeError: on construction, where something is missing.
    """

    name: str  # of its package in library.families, and in --family
    traits: FamilyTraits
    options: type[OptionGroup]  # the family's own group
    scripts: Mapping[str, str]  # entry script, without .py -> method
    # By method: groups in place of the method's and the shared ones of the same name, and further ones. Large models
    # declare here LargeModelOptions, TextCacheOptions and how their blocks are swapped.
    groups: Mapping[str, tuple[type[OptionGroup], ...]] = field(default_factory=dict)
    tools: Mapping[str, type[OptionGroup]] = field(default_factory=dict)  # script of networks/ -> its group
    kinds: tuple[ModelKind, ...]  # of the files of its models
    # Regular expression that is found in the names of layers, as kohya's files have them, in networks of this family
    # alone. Some networks have no such layer.
    network_layers: str
    # Kohya's names of the layer that reads latents, and its inputs: control LoRAs give it more.
    input_layers: Mapping[str, int] = field(default_factory=dict)
    # Part -> sub-folder of a Diffusers model, which is also its name in diffusers' pipelines.
    folders: Mapping[str, str]
    adapter: EntryPoint[[Options], Family]
    # Problems with the files that the options name, as far as names, headers and small JSON files show them.
    check_paths: Callable[[Options], list[str]]
    check_text_paths: Callable[[Options], list[str]]  # the same where only text encoders are needed
    missing_encoders: Callable[[Options], list[str]] = lambda opts: []  # one message for each encoder that is not given
    complete_options: Callable[[Options], Options] = lambda opts: opts  # by what the model's file says of its training
    # The parts of the model with the names of their layers in network files. What a file shows of the sizes of its
    # layers, {kohya's name: (outputs, inputs)}, says which variant it is of.
    layer_names: EntryPoint[[Mapping[str, tuple[int, int]]], tuple[PartNames, ...]]
    # The layers of a model's file, or of the own file of the text encoder that the second argument names.
    file_model: EntryPoint[[Any, str | None], FileModel]
    load_vae: EntryPoint[[Options], nn.Module]  # the VAE alone, as `Loader.load` would return it

    def __post_init__(self) -> None:
        for name in ("name", "scripts", "kinds", "network_layers", "folders"):
            if not getattr(self, name):
                raise TypeError(f"family {self.name!r}: {name} must not be empty")
