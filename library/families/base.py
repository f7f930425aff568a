"""What a model family is to the rest of the toolkit. One adapter per family implements `Family`; nothing else knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.caching.text_outputs import TextLayout
    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import Batch, BlockLayout, LoraTarget, Models, TextCond


@dataclass(frozen=True)
class FamilyTraits:
    """Numbers and words that code outside the family may need. Never ask for `label` to decide anything."""

    label: str  # for messages, e.g. "Stable Diffusion 1.x/2.x"
    text_encoders: tuple[str, ...]  # names of the parts, and LoRA prefixes: ("te",), ("te1", "te2"), ("te1", "te3")
    latent_channels: int
    pixel_multiple: int  # sampled images' sides are floored to this
    bucket_step: int  # bucket sizes must be multiples of this
    objective: Literal["ddpm", "flow"]
    cache_suffix: str  # of latent cache files, e.g. "_sd.npz"
    default_resolution: int  # pixels; side of sample images when nothing is said
    sample_steps: int
    sample_scale: float
    latent_stride: int = 8  # pixels per latent position, each way
    cache_keys_by_size: bool = False  # arrays in latent cache files are named by the size of the latents
    block_layout: BlockLayout | None = None  # how block-wise lists of networks are divided; None: there are no such
    blocks_per_swap: float = 1.0  # that --blocks_to_swap counts as one
    # Flow models: (height, width) of the latents -> s; sampling takes sigma' = s sigma / (1 + (s - 1) sigma).
    flow_shift: Callable[[int, int], float] | None = None


class Family(ABC):
    """A model family, built from the run's options. Every method is usable under autocast and torch.no_grad."""

    traits: FamilyTraits

    def __init__(self, opts: Options):
        self.opts = opts

    @abstractmethod
    def load(self, *, texts_only: bool = False) -> Models:
        """Reads the model named by the options, on the CPU, with nothing trainable and in eval mode.

        In float32, or in the narrower formats of its files where a model is large.

        Args:
            texts_only: only what `encode_text` needs has to be there. Families with files of text encoders leave out
                the VAE and the denoiser, or its weights.

        Raises: UserError: missing or unreadable file, or one of another family.
        """

    @abstractmethod
    def encode_images(
        self, models: Models, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, H/s, W/s) in the form that caches hold.

        s is `traits.latent_stride`.

        Latents are drawn from a distribution; the same `generator` state draws the same ones. A list has one for each
        image, whose latents then do not depend on the rest of the batch.
        """

    @abstractmethod
    def scale_latents(self, latents: Tensor) -> Tensor:
        """Latents as caches hold them to latents as the denoiser sees them."""

    @abstractmethod
    def decode_latents(self, models: Models, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them to pixels (B, 3, H, W), about [-1, 1], not clamped."""

    @abstractmethod
    def encode_text(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, known: TextCond | None = None
    ) -> TextCond:
        """Captions to conditioning; differentiable, so that text encoders can be trained through it.

        What encoders give that `models` no longer has is taken from `known`, an earlier conditioning of the captions.

        `emphasis` is whether brackets weigh words, as in "(this:1.2)"; None leaves it to --weighted_captions. Families
        without such weights ignore it.
        """

    @abstractmethod
    def predict(
        self, models: Models, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch | None = None
    ) -> Tensor:
        """The denoiser's output, same shape as `noisy`. `batch` carries sizes for families with size conditioning."""

    @abstractmethod
    def objective(self) -> Objective:
        """What the denoiser is trained to do. Raises: UserError: options that contradict each other."""

    @abstractmethod
    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        """What the denoiser predicts."""

    @abstractmethod
    def blocks(self, models: Models) -> list[nn.Module]:
        """The denoiser's repeated blocks in execution order: checkpointing, compiling and swapping work on these."""

    def block_number(self, models: Models, name: str) -> int | None:
        """Which entry of `traits.block_layout` a tensor of the denoiser belongs to; None where there are no such."""
        return None

    @abstractmethod
    def lora_targets(self, models: Models) -> list[LoraTarget]:
        """Every layer that a network may adapt, in file order; text encoders first."""

    @abstractmethod
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        """Writes a whole model. `save_as`: ckpt, safetensors, diffusers, diffusers_safetensors. None keeps dtypes."""

    def companions(self, models: Models, path: Path) -> list[Path]:
        """What `save` writes beside a model's file `path`: files of parts that it does not hold."""
        return []

    def text_layout(self) -> TextLayout | None:
        """How files of cached text-encoder outputs look; None: this family has none."""
        return None

    @abstractmethod
    def model_metadata(self, models: Models) -> dict[str, Any]:
        """ss_* values that describe the base model (ss_v2, ss_base_model_version, ...), see formats.

        Also `modelspec.architecture`, `modelspec.implementation`, `modelspec.prediction_type` and the default
        `modelspec.resolution`, all without the suffix of what is trained.
        """
