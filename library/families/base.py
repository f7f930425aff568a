"""What a model family does, as roles that the rest of the toolkit calls. `FamilySpec` says what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.types import FamilyTraits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.objectives.objective import Objective
    from library.options.base import Options
    from library.types import Batch, LoraTarget, Models, Residuals, TextCond, TextLayout


Shrinking = Callable[["Sequence[nn.Module]", float], "AbstractContextManager[Callable[[int | None], None]]"]


class Role:
    """A part of a family's behaviour, for the options of a run. It keeps nothing of a loaded model."""

    def __init__(self, opts: Options):
        self.opts = opts


class Loader(Role, ABC):
    @abstractmethod
    def load(self, *, texts_only: bool = False) -> Models:
        """Reads the model named by the options, on the CPU, frozen and in eval mode.

        In float32, or in the narrower dtypes of its files where a model is large.

        Args:
            texts_only: only what `TextEncoding.encode` needs has to be there. Families with files of text encoders
                leave out the VAE and the denoiser, or its weights.

        Raises: UserError: missing or unreadable file, or one of another family.
        """


class Latents(ABC):
    """Pixels to latents and back. s is `traits.latent_stride`. Usable under autocast and torch.no_grad."""

    @abstractmethod
    def encode(
        self, models: Models, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, H/s, W/s) in the form that caches hold.

        Latents are drawn from a distribution; the same `generator` state draws the same ones. A list has one for each
        image, whose latents then do not depend on the rest of the batch.
        """

    @abstractmethod
    def scale(self, latents: Tensor) -> Tensor:
        """Latents as caches hold them to latents as the denoiser sees them, (B, C, H/s, W/s) both."""

    @abstractmethod
    def decode(self, models: Models, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them, (B, C, H/s, W/s), to pixels (B, 3, H, W), about [-1, 1], not clamped."""

    def inpainting_input(
        self,
        models: Models,
        pixels: Tensor,
        masks: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """`Batch.inpainting` of pixels (B, 3, H, W) in [-1, 1] with masks as `Batch.inpainting_masks`; float32.

        What a mask covers is grey, the middle of the pixels' range. Each latent has the mask of the pixel at its upper
        left. So were the first models for inpainting trained (Rombach et al. 2022, arXiv:2112.10752).
        """
        import torch
        from torch.nn import functional

        masked = self.scale(self.encode(models, pixels * (1 - masks), generator).float())
        return torch.cat([functional.interpolate(masks.float(), size=masked.shape[-2:]), masked], dim=1)


class TextEncoding(Role, ABC):
    """The conversion of captions to conditioning."""

    @abstractmethod
    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """The conditioning of captions; differentiable, so that text encoders can be trained through it.

        What encoders give that `models` no longer has is taken from `cached`, an earlier conditioning of the captions.

        `emphasis` is whether brackets weigh words, as in "(this:1.2)"; None leaves it to --weighted_captions. Families
        without such weights ignore it.
        """

    def with_pooled(self, cond: TextCond, pooled: Tensor) -> TextCond:
        """The conditioning with another vector, (B, width), for the text as a whole.

        Only families with `FamilyTraits.pooled_by_image` have it. Raises: UserError: it is of another width.
        """
        raise NotImplementedError

    def layout(self, models: Models | None = None) -> TextLayout | None:
        """The layout of cache files of text-encoder outputs; None: this family has none.

        Args: models: the loaded model, where there is one: it decides lengths that no option gives.
        """
        return None


class Denoiser(Role, ABC):
    """The trained network: what it predicts, and from which blocks it is made."""

    @abstractmethod
    def predict(
        self,
        models: Models,
        noisy: Tensor,
        timesteps: Tensor,
        cond: TextCond,
        batch: Batch | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """The denoiser's output, same shape as `noisy`, (B, C, h, w); usable under autocast and torch.no_grad.

        Args:
            timesteps: (B,), in the units of the family's objective.
            batch: carries sizes for families with size conditioning, and the guidance of distilled models.
            residuals: what a ControlNet adds to the hidden states, in the family's own order and shapes.
        """

    def control_channels(self, models: Models) -> int:
        """Channels of `Batch.control_latents`, which the denoiser then reads beside the noisy latents; 0: none."""
        return 0

    @abstractmethod
    def objective(self) -> Objective:
        """The training objective: noise, target and loss. Raises: UserError: options that contradict each other."""

    @abstractmethod
    def prediction_type(self) -> Literal["epsilon", "v_prediction", "flow"]:
        """The quantity that the denoiser predicts."""

    @abstractmethod
    def blocks(self, models: Models) -> list[nn.Module]:
        """The denoiser's repeated blocks in execution order: checkpointing, compiling and swapping work on these."""

    def block_number(self, models: Models, name: str) -> int | None:
        """The entry of `traits.block_layout` that a tensor of the denoiser belongs to; None: none."""
        return None


class Targets(Role, ABC):
    @abstractmethod
    def lora(self, models: Models) -> list[LoraTarget]:
        """Every layer that a network may adapt, in file order; text encoders first."""


class Writer(Role, ABC):
    @abstractmethod
    def save(
        self, models: Models, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        """Writes a whole model. `save_as`: ckpt, safetensors, diffusers, diffusers_safetensors. None keeps dtypes."""

    def extra_files(self, models: Models, path: Path) -> list[Path]:
        """The files that `save` writes beside the model's file `path`, for parts that it does not hold."""
        return []

    @abstractmethod
    def metadata(self, models: Models) -> dict[str, Any]:
        """ss_* values that describe the base model (ss_v2, ss_base_model_version, ...), see formats.

        Also `modelspec.architecture`, `modelspec.implementation`, `modelspec.prediction_type` and the default
        `modelspec.resolution`, all without the suffix of what is trained; and `modelspec.whole`, the architecture of
        whole models, where it is another than what networks are matched by.
        """


class Control(Role, ABC):
    """ControlNets: networks that read an image beside the latents and steer the denoiser.

    Zhang et al. 2023, arXiv:2302.05543.
    """

    needs_vae: bool = False  # whether predictions use the VAE: some ControlNets read latents of the control image

    @abstractmethod
    def build(self, models: Models) -> nn.Module:
        """A new ControlNet for the denoiser, which changes nothing until it is trained."""

    @abstractmethod
    def load(self, models: Models, name: str) -> nn.Module:
        """Reads a ControlNet for the denoiser, in float32 on the CPU, frozen and in eval mode.

        Args: name: a file in any layout of the family's ControlNets, a Diffusers folder of one, or its hub id.
        Raises: UserError: missing, unreadable, or made for another model.
        """

    @abstractmethod
    def predict(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Tensor:
        """`Denoiser.predict` with the ControlNet, which acts where `batch` has control images; differentiable."""

    @abstractmethod
    def save(
        self, net: nn.Module, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        """Writes a ControlNet in the layout that programs read.

        Args:
            save_as: safetensors, ckpt, pt, or, where diffusers has such networks, diffusers for a folder.
            dtype: of every tensor; None: as in memory.
            metadata: modelspec.* values, for .safetensors files of families whose ControlNets have some.
        """


class Family:
    """A model family, made from the options of a run: one object for each role.

    `control` and `lllite` are None where there are no ControlNets and no ControlNet-LLLite for it here. `text_places`
    gives the paths of the denoiser's cross-attention layers by the names that files have for their places, in the
    order of the denoiser; None where no such files are known. `text_layers` gives the paths of the layers in which the
    image, and nothing else, reads the text, diffusers' `Attention` each; it is None where images and texts go through
    the same layers. `shrinking` is Deep Shrink, of the denoiser and the
    ControlNets that act on it, to a ratio of the sides: inside, what it gives says before which input block of the
    denoiser features become smaller, or None for none. It is None where the denoiser is no U-Net.
    `modulation` gives the path of what embeds time and text in the denoiser, and by path the linear layers that read
    nothing else; it is None where there are none.
    """

    traits: FamilyTraits

    def __init__(
        self,
        opts: Options,
        *,
        loader: Loader,
        latents: Latents,
        text: TextEncoding,
        denoiser: Denoiser,
        targets: Targets,
        writer: Writer,
        control: Control | None = None,
        lllite: Control | None = None,
        text_places: Callable[[Models], dict[str, list[str]]] | None = None,
        text_layers: Callable[[Models], list[str]] | None = None,
        shrinking: Shrinking | None = None,
        modulation: Callable[[Models], tuple[str, dict[str, nn.Module]]] | None = None,
    ):
        self.opts = opts
        self.loader = loader
        self.latents = latents
        self.text = text
        self.denoiser = denoiser
        self.targets = targets
        self.writer = writer
        self.control = control
        self.lllite = lllite
        self.text_places = text_places
        self.text_layers = text_layers
        self.shrinking = shrinking
        self.modulation = modulation
