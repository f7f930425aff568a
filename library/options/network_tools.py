"""The tools that work on network files alone: merging, resizing, splitting, converting, looking into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt
from library.options.model_tools import Precision

if TYPE_CHECKING:
    from library.types import FamilyTraits

_DEVICE = "device to compute on, such as cuda; the CPU by default"


def missing(group: OptionGroup, *names: str) -> Iterable[str]:
    """A problem for each of these options that is not given."""
    yield from (f"--{name} is required" for name in names if not getattr(group, name))


@dataclass(frozen=True, kw_only=True)
class SvdMergeOptions(OptionGroup, group="svd_merge", title="Merging network files at a new rank"):
    save_precision: Precision | None = opt(None, "dtype of the new file; that of --precision by default")
    precision: Precision = opt("float", "dtype to which what is read is rounded; sums are always computed in float32")
    save_to: str | None = opt(None, "new file: .safetensors, or .ckpt or .pt, which have no metadata")
    models: list[str] | None = opt(None, "network files (LoRA, LoCon) to merge")
    ratios: list[float] | None = opt(None, "strength of each file")
    lbws: list[str] | None = opt(
        None, "block weights for each file: 12, 17, 20 or 26 numbers as in [1,0.5,...], or blocks by name"
    )
    new_rank: int = opt(4, "rank of linear layers and 1x1 convolutions", at_least=1)
    new_conv_rank: int | None = opt(None, "rank of larger convolutions; --new_rank by default", at_least=1)
    clamp_quantile: float = opt(
        1.0,
        "cut off the values of a layer's matrices that are larger than this quantile of them; 1 cuts nothing off, 0.99 "
        "is what sd-scripts does",
        above=0,
        at_most=1,
    )
    device: str | None = opt(None, _DEVICE)
    no_metadata: bool = opt(False, "write only the type of network and base model, modelspec and hashes")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return missing(self, "models", "ratios", "save_to")


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(OptionGroup, group="resize", title="Resizing a network file"):
    save_precision: Precision | None = opt(None, "dtype of the new file; float by default")
    new_rank: int = opt(
        4, "rank of linear layers and 1x1 convolutions; with --dynamic_method the largest rank", at_least=1
    )
    new_conv_rank: int | None = opt(None, "the same for larger convolutions; --new_rank by default", at_least=1)
    save_to: str | None = opt(None, "new file: .safetensors, or .ckpt or .pt, which have no metadata")
    model: str | None = opt(None, "network file (LoRA, LoCon, DoRA) to resize", exists="file")
    device: str | None = opt(None, _DEVICE)
    verbose: bool = opt(False, "show the new rank of each layer, and what is kept of it")
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = opt(
        None,
        "choose each layer's rank by --dynamic_param: keep singular values above the largest one divided by it "
        "(sv_ratio), that share of the Frobenius norm (sv_fro), or that share of the singular values' sum "
        "(sv_cumulative)",
    )
    dynamic_param: float | None = opt(None, "for --dynamic_method", above=0)
    svd_lowrank_niter: int = opt(2, "has no effect: singular values are exact here, and faster", at_least=0)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from missing(self, "model", "save_to")
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            yield "--dynamic_method and --dynamic_param go together: give both or neither"
        elif self.dynamic_param is not None:
            if self.dynamic_method == "sv_ratio" and self.dynamic_param < 1:
                yield f"--dynamic_param must be at least 1 for sv_ratio, got {self.dynamic_param:g}"
            if self.dynamic_method != "sv_ratio" and self.dynamic_param > 1:
                yield f"--dynamic_param must be at most 1 for {self.dynamic_method}, got {self.dynamic_param:g}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if "svd_lowrank_niter" in opts.explicit:
            yield "--svd_lowrank_niter has no effect: singular values are exact here, and faster"


@dataclass(frozen=True, kw_only=True)
class DyLoraOptions(OptionGroup, group="dylora", title="Cutting a DyLoRA file"):
    unit: int | None = opt(None, "ranks of one file more than of the one before; those that were trained", at_least=1)
    save_to: str | None = opt(None, "names of the new files: a.safetensors gives a-0004.safetensors and so on")
    model: str | None = opt(None, "DyLoRA file", exists="file")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return missing(self, "model", "save_to", "unit")


@dataclass(frozen=True, kw_only=True)
class CheckWeightsOptions(OptionGroup, group="check_weights", title="File"):
    file: str | None = opt(None, "network file", positional=True)
    show_all_keys: bool = opt(False, "show every tensor, not only the matrices", short="-s")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup, group="convert", title="Converting a network file"):
    model: str | None = opt(None, "network file in any layout that is known", exists="file")
    save_to: str | None = opt(None, "new file: .safetensors, or .ckpt or .pt, which have no metadata")
    to: Literal["kohya", "diffusers", "comfyui"] = opt(
        "kohya",
        "layout of the new file: kohya is that of training here, for web UIs and ComfyUI; diffusers is PEFT's, with "
        "query, key and value apart; comfyui has the original layers' names behind diffusion_model.",
    )
    family: str | None = opt(None, "model family of the file; by default the one that has all of its layers")
    fold_alpha: bool = opt(
        False, "for --to diffusers: put alphas into the matrices, for readers that do not know diffusers' metadata"
    )
    save_precision: Precision | None = opt(None, "dtype of the new file; as it is by default")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        return missing(self, "model", "save_to")

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.fold_alpha and self.to != "diffusers":
            yield f"--fold_alpha has no effect with --to {self.to}, whose files have alphas"


LAYOUTS = {"ai-toolkit": "diffusers", "sd-scripts": "kohya"}  # other names for layouts -> that of --to


@dataclass(frozen=True, kw_only=True)
class ConvertPairOptions(OptionGroup, group="convert_pair", title="Converting a network file"):
    src: str = opt("ai-toolkit", "layout of the file: ai-toolkit or sd-scripts")
    dst: str = opt("sd-scripts", "layout of the new file: ai-toolkit or sd-scripts")
    src_path: str | None = opt(None, "network file", exists="file")
    dst_path: str | None = opt(None, "new file: .safetensors, or .ckpt or .pt, which have no metadata")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from missing(self, "src_path", "dst_path")
        for name in ("src", "dst"):
            value = getattr(self, name)
            if value not in LAYOUTS:
                yield f"--{name}: must be {' or '.join(LAYOUTS)}, got {value!r}"
        if self.src == self.dst:
            yield f"--src and --dst are both {self.src}: there is nothing to convert"
