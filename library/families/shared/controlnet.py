"""What the ControlNets of all families share: residuals in the prediction, copies of the denoiser, and writing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import KeyMap, Rename, Rule
from library.checkpoints.writing import materialise, write_safetensors, write_torch
from library.errors import UserError
from library.families.base import Control
from library.families.shared.writing import deferred_part
from library.runtime.durable import replacing_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.base import Denoiser
    from library.options.base import Options
    from library.types import Batch, Models, Residuals, TextCond

SAME_NAMES = KeyMap(Rename("{rest}", "{rest}"))
_SILU_GAIN = 0.3558**-0.5  # E[silu(z)^2] of normally distributed z
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # in a Diffusers folder


class ResidualControl(Control):
    """ControlNets whose outputs are added to the denoiser's hidden states."""

    def __init__(self, opts: Options, denoiser: Denoiser):
        super().__init__(opts)
        self._denoiser = denoiser

    @abstractmethod
    def residuals(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Residuals:
        """What `Denoiser.predict` takes, from `batch.control` and what it is itself given; differentiable."""

    def predict(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Tensor:
        """See `Control.predict`."""
        residuals = None
        if batch.control is not None:
            residuals = self.residuals(models, net, noisy, timesteps, cond, batch)
        return self._denoiser.predict(models, noisy, timesteps, cond, batch, residuals)


def with_copies(make: Callable[[], nn.Module], denoiser: nn.Module) -> nn.Module:
    """A new ControlNet with the denoiser's weights where both have the same names and shapes; float32, on the CPU."""
    net = make()
    own = net.state_dict()
    weights = denoiser.state_dict()
    copied = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    net.load_state_dict(copied, strict=False)
    return net


def start_hint(embedding: nn.Module) -> None:
    """Gives the convolutions that read the control image Gaussian weights, as the paper has them.

    Their deviation keeps the size of what they make of the image from one to the next (He et al. 2015,
    arXiv:1502.01852, with the gain of SiLU). With PyTorch's own weights and biases, what edges change at the end is
    1/350 of what stands there for every image.

    Args: embedding: diffusers' `ControlNetConditioningEmbedding`. Its last convolution stays zero.
    """
    from torch import nn

    for convolution in (embedding.conv_in, *embedding.blocks):
        fan_in = convolution.weight[0].numel()
        nn.init.normal_(convolution.weight, std=_SILU_GAIN / fan_in**0.5)
        nn.init.zeros_(convolution.bias)


def require_same(net: Mapping[str, Any], denoiser: Mapping[str, Any], words: tuple[str, ...], name: str) -> None:
    """Compares the configurations of a ControlNet and its denoiser.

    Args: words: the entries that must be equal. name: of the ControlNet, for messages.
    Raises: UserError: they are not, as the ControlNet is for another model.
    """
    for word in words:
        own, wanted = (list(value) if isinstance(value, tuple) else value for value in (net[word], denoiser[word]))
        if own != wanted:
            raise UserError(f"{name}: this ControlNet is made for another model: {word} is {own}, not {wanted}")


def hint_rules(file: str, model: str, steps: int) -> list[Rule]:
    """Names of the convolutions that read the control image; files number them together with their activations.

    Args: steps: the number of convolutions between the first and the last.
    """
    between = (Rename(f"{file}.{2 * step + 2}.{{p}}", f"{model}.blocks.{step}.{{p}}") for step in range(steps))
    first, last = Rename(f"{file}.0.{{p}}", f"{model}.conv_in.{{p}}"), f"{file}.{2 * steps + 2}.{{p}}"
    return [first, *between, Rename(last, f"{model}.conv_out.{{p}}")]


def write_controlnet(
    net: nn.Module,
    path: Path,
    keys: KeyMap,
    *,
    save_as: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes a ControlNet of diffusers. See `Control.save`. Args: keys: a single file's names against the model's."""
    how = {"tensor_specs": {}, "folder_dtype": None, "dtype": dtype}
    if save_as.startswith("diffusers"):
        with replacing_folder(path) as folder:
            net.save_config(folder)
            write_safetensors(
                folder / _WEIGHTS_FILE, deferred_part(SAME_NAMES, net.state_dict(), **how), {"format": "pt"}
            )
        return
    tensors = deferred_part(keys, net.state_dict(), **how)
    if save_as == "safetensors":
        write_safetensors(path, tensors, metadata)
    else:
        write_torch(path, {name: materialise(tensor) for name, tensor in tensors.items()})
