"""What a training method is to the loop: what it trains, with which rates, and how that is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.families.base import Family
    from library.options.base import Options
    from library.types import Denoise, Models


class Method(ABC):
    """A training method, built from the run's options."""

    def __init__(self, opts: Options):
        self.opts = opts

    @abstractmethod
    def attach(self, family: Family, models: Models) -> None:
        """Freezes what is not trained and adds what is. Raises: UserError: nothing would be trained."""

    @abstractmethod
    def trainable(self) -> nn.Module:
        """The one module that holds all trained parameters (accelerate prepares it; state is its state_dict)."""

    def added(self) -> nn.Module | None:
        """What acts on the models from beside them, such as a network; None: their own weights are trained."""
        return None

    def denoise(self, family: Family, models: Models) -> Denoise:
        """How the prediction is computed in steps, validation and sample images; called once, after `attach`.

        The default is the family's denoiser alone. A method whose own modules feed the denoiser wraps it.
        """
        return partial(family.denoiser.predict, models)

    def text_fingerprint(self) -> dict[str, str]:
        """By text encoder, a checksum of what changes its outputs while it is frozen, for the notes of cache files."""
        return {}

    def needs_vae(self) -> bool:
        """Whether predictions use the VAE, which then stays on the device where latents are cached, too."""
        return False

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: {"params": [...], "lr": float, "name": str}; the name labels the rate in the logs."""

    @abstractmethod
    def trained_text_encoders(self) -> list[str]:
        """The text encoders in which gradients are needed at present; for those that have called `attach`."""

    def live_text_encoders(self) -> list[str]:
        """The text encoders that encode captions in every step, even where outputs are cached."""
        return self.trained_text_encoders()

    @abstractmethod
    def file_suffix(self) -> str:
        """Of saved files, with the dot; empty for folders."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """ss_* values of the method, and `modelspec.suffix` (e.g. "/lora") for the architecture."""

    @abstractmethod
    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Writes the trained weights to `path`, beside it first and renamed into place when whole."""

    def companions(self, path: Path) -> list[Path]:
        """The files beside `path` that `save` writes too; they are uploaded and removed with it."""
        return []

    def start_epoch(self, epoch: int) -> None:  # noqa: B027
        """Called before each epoch, counted from 1."""

    def start_step(self, step: int) -> None:  # noqa: B027
        """Called before each optimizer step and its forward passes; `step` of them are done, also before resuming."""

    def set_strength(self, strength: float) -> None:  # noqa: B027
        """Multiplies what a network adds by this, from now on; must not wait for the device.

        Called before each forward pass of training with `Batch.network_multiplier`, and for `--am` of sample prompts.
        """

    def before_step(self) -> None:  # noqa: B027
        """Called when the gradients are as the optimizer step will see them; must not wait for the device."""

    def after_step(self) -> None:  # noqa: B027
        """Called after each optimizer step; must not wait for the device."""
