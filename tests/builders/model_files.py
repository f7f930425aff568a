"""Tiny model files in every layout that tools read, and the models that the families' loaders make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.families.registry import FAMILIES
from library.types import LoraTarget, Models
from tests.builders import write_tiny_sd1, write_tiny_sd2
from tests.builders.flux import flux_tensors, write_bundle, write_flux, write_part_files
from tests.builders.fp8 import fp8_scaled
from tests.builders.options import options_for
from tests.builders.sd3 import write_encoder_file, write_tiny_sd3
from tests.builders.sdxl import write_tiny_sdxl
from tests.builders.t5 import write_t5_tokenizer

CLIP_LEVEL = "cond_stage_model.transformer.text_model."


@dataclass(frozen=True)
class Case:
    """A layout: how a file of it is written, and which other files and options its loader wants."""

    family: str
    write: Callable[[Path], Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[Path], Mapping[str, Any]] = lambda folder: {}

    def models(self, path: Path) -> tuple[Models, list[LoraTarget]]:
        """The loaded model, and the layers that the family's networks know."""
        values = {"pretrained_model_name_or_path": str(path), **self.options, **self.others(path.parent)}
        family = FAMILIES[self.family].adapter(options_for(self.family, "network", **values))
        models = family.loader.load()
        return models, family.targets.lora(models)


def _without_level(path: Path) -> Path:
    tensors = load_file(write_tiny_sd1(path))
    save_file({key.replace(CLIP_LEVEL, CLIP_LEVEL.replace("text_model.", "")): t for key, t in tensors.items()}, path)
    return path


def _diffusers_flux(path: Path) -> Path:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    tensors = flux_tensors()
    for name in [name for name in tensors if ".linear1." in name]:  # their converter knows one width only
        tensors[name] = torch.zeros(7 * 3072, *tensors[name].shape[1:])
    theirs = convert_flux_transformer_checkpoint_to_diffusers(tensors)
    width = 64
    for name, value in flux_tensors().items():
        if ".linear1." in name:
            place, parameter = name.split(".")[1], name.rpartition(".")[2]
            cut = value.split([width, width, width, 4 * width])
            for part, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), cut, strict=True):
                theirs[f"single_transformer_blocks.{place}.{part}.{parameter}"] = rows
    save_file({name: tensor.clone().contiguous() for name, tensor in theirs.items()}, path)
    return path


def _scaled_flux(path: Path) -> Path:
    in_blocks: Callable[[str, Tensor], bool] = lambda key, _: "_blocks." in key  # noqa: E731
    save_file(fp8_scaled(flux_tensors(), in_blocks)[0], path)
    return path


def _sd3_without_prefix(path: Path) -> Path:
    tensors = load_file(write_tiny_sd3(path, "5-medium"))
    save_file({key.removeprefix("model.diffusion_model."): tensor for key, tensor in tensors.items()}, path)
    return path


def _flux_parts(folder: Path) -> dict[str, Any]:
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return {**write_part_files(folder), "tokenizer_cache_dir": str(folder)}


def _tokenizer(folder: Path) -> dict[str, Any]:
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return {"tokenizer_cache_dir": str(folder)}


def _sd3_parts(folder: Path) -> dict[str, Any]:
    files = {name: folder / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")}
    for part, path in zip(("te1", "te2", "te3"), files.values(), strict=True):
        write_encoder_file(path, part)
    return {**{name: str(path) for name, path in files.items()}, **_tokenizer(folder)}


CASES = {
    "sd1": Case("sd", lambda path: write_tiny_sd1(path)),
    "sd1-ckpt": Case("sd", lambda path: write_tiny_sd1(path.with_suffix(".ckpt"))),
    "sd1-without-level": Case("sd", _without_level),
    "sd2": Case("sd", lambda path: write_tiny_sd2(path), {"v2": True}),
    "sdxl": Case("sdxl", lambda path: write_tiny_sdxl(path)),
    "flux": Case("flux", lambda path: write_flux(path.parent), others=_flux_parts),
    "flux-prefix": Case(
        "flux", lambda path: write_flux(path.parent, prefix="model.diffusion_model."), others=_flux_parts
    ),
    "flux-diffusers": Case("flux", _diffusers_flux, others=_flux_parts),
    "flux-bundle": Case("flux", lambda path: write_bundle(path), others=_tokenizer),
    "flux-scaled": Case("flux", _scaled_flux, others=_flux_parts),
    "sd3": Case("sd3", lambda path: write_tiny_sd3(path), others=_sd3_parts),
    "sd3-bundle": Case(
        "sd3", lambda path: write_tiny_sd3(path, "5-large", encoders=("te1", "te2", "te3")), others=_tokenizer
    ),
    "sd3-without-prefix": Case("sd3", _sd3_without_prefix, others=_sd3_parts),
}
ENCODER_FILES = {"flux": ("te1", "te3"), "sd3": ("te1", "te2", "te3")}
ENCODER_OPTIONS = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}
