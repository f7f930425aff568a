"""Which model is trained, and what it is built with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.options.base import OptionGroup, Options, opt
from library.runtime.paths import unwritable

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup, group="model", title="Model"):
    needs_name: ClassVar[bool] = True  # False: parts of a model may be enough
    takes_inpainting: ClassVar[bool] = False  # whether models that read a mask and an image beside latents will do

    pretrained_model_name_or_path: str | None = opt(
        None, "base model: a checkpoint file, a Diffusers folder, or a hub id such as owner/model"
    )
    tokenizer_cache_dir: str | None = opt(
        None, "folder in which tokenizers are stored, so that later runs work offline"
    )
    vae: str | None = opt(None, "VAE to use in place of the model's own: checkpoint, VAE file, Diffusers VAE or hub id")
    no_half_vae: bool = opt(False, "run the VAE in float32 whatever the mixed precision, for VAEs that overflow fp16")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.needs_name and not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path: missing; give a checkpoint file, a Diffusers folder or a hub id"
        folder = self.tokenizer_cache_dir
        if folder and not os.path.isdir(folder) and (reason := unwritable(Path(folder))):
            yield f"--tokenizer_cache_dir: {folder} cannot be made: {reason}"
