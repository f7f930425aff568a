"""Images and losses that show, during training, how far it has come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


Sampler = Literal[
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
]  # fmt: skip
_OCCASIONS = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup, group="sampling", title="Sample images"):
    sample_prompts: str | None = opt(
        None, "file of prompts for sample images: .txt, .toml or .json", exists="file", only_with=_OCCASIONS
    )
    sample_at_first: bool = opt(False, "generate sample images before the first step too")
    sample_every_n_steps: int | None = opt(
        None, "generate sample images every N optimizer steps", at_least=1, lenient=True
    )
    sample_every_n_epochs: int | None = opt(None, "generate sample images every N epochs", at_least=1, lenient=True)
    sample_sampler: Sampler = opt("ddim", "sampler of the sample images")

    @property
    def draws(self) -> bool:
        """Whether there are prompts, and occasions for their images."""
        return bool(self.sample_prompts) and any(getattr(self, name) for name in _OCCASIONS)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.draws and Path(self.sample_prompts).suffix.lower() not in (".txt", ".toml", ".json"):
            yield f"--sample_prompts: must be a .txt, .toml or .json file, got {self.sample_prompts!r}"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        given = [f"--{name}" for name in _OCCASIONS if getattr(self, name)]
        if given and not self.sample_prompts:
            yield f"{given[0]}: no sample images without --sample_prompts"


@dataclass(frozen=True, kw_only=True)
class PromptTextOptions(OptionGroup, group="texts", title="Texts", always=True):
    """How prompts become conditioning. Training offers none of it: there, texts are as they are trained."""

    clip_skip: int | None = opt(
        None,
        "use the output of this layer of the text encoder, counted from the end (1: the last, 2: the one before it); "
        "by default 1, with SDXL 2",
        at_least=1,
        off=0,
    )
    emb_normalize_mode: Literal["original", "none", "abs"] = opt(
        "none",
        "how weights such as (word:1.2) change the whole text: original keeps the mean of its encoding, abs that of "
        "absolute values, none neither",
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup, group="validation", title="Validation"):
    validation_seed: int | None = opt(
        None, "seed that chooses the validation images and their noise; --seed if not given", at_least=0
    )
    validation_split: float = opt(
        0.0,
        "share of the images held out from training, to measure the validation loss",
        at_least=0,
        at_most=1,
        lenient=True,
    )
    validate_every_n_steps: int | None = opt(None, "validate every N optimizer steps", at_least=1, off=0)
    validate_every_n_epochs: int | None = opt(
        None,
        "validate every N epochs; after each epoch if neither this nor --validate_every_n_steps is given",
        at_least=1,
        off=0,
    )
    max_validation_steps: int | None = opt(
        None, "maximum number of batches of images per validation; all if not given", at_least=1
    )
    save_best_validation: bool = opt(False, "save the model with the lowest validation loss as <output_name>-best")
    early_stop_patience: int | None = opt(
        None,
        "stop the run after this many validations in a row whose loss is not lower than the best one by more than the "
        "standard error of their difference",
        at_least=1,
        off=0,
    )
