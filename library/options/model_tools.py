"""Merging networks into models and extracting them from models: what the scripts of all families have in common.

Each family derives its own groups, which name the models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

Precision = Literal["float", "fp16", "bf16"]
WEIGHT_ENDINGS = (".safetensors", ".ckpt", ".pt")


class ModelOption(NamedTuple):
    """An option that names a model's file: the option of what is written of it, and of which text encoder it is."""

    option: str
    save_to: str
    encoder: str | None = None


class Rewritten(NamedTuple):
    """A model's file that networks are merged into, and the file to write."""

    option: str
    path: str
    save_option: str
    save_to: str
    encoder: str | None


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup, group="merge", title="Merging"):
    """`MODELS` and `FAMILIES` are what a family declares: the options that name models, and the families of these."""

    MODELS: ClassVar[tuple[ModelOption, ...]] = ()
    FAMILIES: ClassVar[tuple[str, ...]] = ()

    save_precision: Precision | None = opt(
        None, "dtype of the file that is written; by default that of the model's file, and without a model --precision"
    )
    precision: Precision = opt(
        "float", "dtype in which changes are added to weights; the changes themselves are computed in float32"
    )
    save_to: str | None = opt(None, "file to write: .safetensors, or .ckpt or .pt, which have no metadata")
    models: list[str] | None = opt(None, "network files to merge, of any type and layout that can be read")
    ratios: list[float] | None = opt(None, "strength of each of --models; 1 for all by default")
    lbws: list[str] | None = opt(
        None,
        "block weights for each of --models, as a list of 12, 17, 20 or 26 numbers, [1,0.5,...], for U-Nets, or by the "
        "blocks' names, input_blocks.0-5=0.5,te1=0,*=1, where the first that fits a layer counts",
    )
    no_metadata: bool = opt(False, "write no metadata into a model; into a network only what programs need to use it")
    concat: bool = opt(
        False, "without a model: put the ranks of the networks side by side, which is exact and makes a larger file"
    )
    shuffle: bool = opt(False, "without a model: change the order of the ranks, which changes nothing else")
    legacy_ratio: bool = opt(
        False, "without a model: strengths as sd-scripts up to 0.10 has them, the squares of --ratios"
    )
    device: str | None = opt(None, "device to compute on, such as cuda; the CPU by default")

    @property
    def device_name(self) -> str:
        return self.device or "cpu"

    def rewritten(self) -> list[Rewritten]:
        """The models that are given, to be merged into."""
        return [
            Rewritten(named.option, path, named.save_to, getattr(self, named.save_to), named.encoder)
            for named in self.MODELS
            if (path := getattr(self, named.option))
        ]

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.models:
            yield "--models is required: name the network files to merge"
        for name in ("ratios", "lbws"):
            given = getattr(self, name)
            if self.models and given and len(given) != len(self.models):
                yield f"--{name}: {len(given)} for {len(self.models)} --models; give one for each"
        if not self.rewritten() and not self.save_to:
            yield "--save_to is required: name the file to write"
        for named in self.MODELS:
            model, target = getattr(self, named.option), getattr(self, named.save_to)
            if model and not target:
                yield f"--{named.save_to} is required with --{named.option}: name the file to write"
            if target and not model and (named.save_to != "save_to" or self.rewritten()):
                yield f"--{named.save_to}: needs --{named.option}, the model to merge into"
        counted = Counter(model.save_to for model in self.rewritten() if model.save_to)
        yield from (f"{path}: two files would be written to this name" for path, count in counted.items() if count > 1)

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.rewritten():
            idle = [name for name in ("concat", "shuffle", "legacy_ratio") if getattr(self, name)]
            yield from (f"--{name}: has no effect when a model is given" for name in idle)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(OptionGroup, group="extract", title="Extracting"):
    """`FAMILIES` and `NETWORK` are what a family declares: those of the models, and the network module for LoRA."""

    FAMILIES: ClassVar[tuple[str, ...]] = ()
    NETWORK: ClassVar[str] = "networks.lora"

    save_precision: Precision | None = opt(None, "dtype of the network file; float by default")
    model_org: str | None = opt(None, "file of the original model", required=True)
    model_tuned: str | None = opt(None, "file of the tuned model", required=True)
    save_to: str | None = opt(
        None, "network file to write: .safetensors, or .ckpt or .pt, which have no metadata", required=True
    )
    dim: int = opt(4, "rank of the layers", at_least=1)
    device: str | None = opt(None, "device to compute on, such as cuda; the CPU by default")
    clamp_quantile: float = opt(
        0.99,
        "cut off the values of a layer's matrices that are larger than this quantile of them; 1 cuts nothing off",
        at_least=0,
        at_most=1,
    )
    no_metadata: bool = opt(False, "write only the type of network and base model, modelspec and hashes")
    type: Literal["lora", "lokr"] = opt(
        "lora", "type of network: LoRA, or LoKr by the nearest Kronecker product, in which --dim is that of its factor"
    )
    factor: int = opt(
        -1, "with --type=lokr: into how many parts both sides of a weight are cut at most; -1: near the square root"
    )
    exact: bool = opt(False, "decompose every difference whole, which takes many times as long, as a reference")

    # What some scripts have options for.
    @property
    def least_change(self) -> float:
        """A text encoder of which no weight differs by more than this is left out."""
        return 0.0

    @property
    def rank_of_kernels(self) -> int:
        """The rank of convolutions larger than 1x1; 0: they are left out."""
        return 0

    @property
    def predicts_v(self) -> bool:
        return False

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.type == "lokr" and "clamp_quantile" in opts.explicit:
            yield "--clamp_quantile: has no effect with --type=lokr"
        if self.type != "lokr" and "factor" in opts.explicit:
            yield "--factor: has no effect without --type=lokr"
