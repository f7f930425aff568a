"""ControlNet-LLLite for SDXL: small networks before layers of the U-Net, each of which reads the control image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from library.checkpoints.keymap import first_few
from library.checkpoints.reading import open_weights
from library.checkpoints.writing import materialise, write_safetensors, write_torch
from library.errors import UserError
from library.families.base import Control
from library.families.sdxl.lllite_file import PREFIX, sizes_of
from library.families.sdxl.targets import unet_targets
from library.families.shared.building import build
from library.families.shared.controlnet import SAME_NAMES
from library.families.shared.reading import error_prefix
from library.families.shared.writing import deferred_part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.base import Denoiser
    from library.options.base import Options
    from library.types import Batch, Models, TextCond

EMBEDDING, WIDTH = 32, 64  # channels of the embedded control image, and inner width, where no option says
# The layers of the way down and of the middle that a new one has networks before.
_TRAINED = re.compile(r"(?:input_blocks_(\d+)|middle_block)_\d+_transformer_blocks_\d+_attn(1_to_[qkv]|2_to_q)")
# By depth, the convolutions that embed the control image: kernel size and stride of each.
_STEPS = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}


class LlliteLayer(nn.Module):
    """x + multiplier * up(relu(mid([c, relu(down(x))]))), with c the embedded control image at x's resolution.

    Args:
        width: of x.
        depth: 1 to 3, how often the U-Net has halved the latents' size there, plus one.
        embedding: channels of c.
        inner: width between the layers.
        conv: x is (B, width, h, w), before a convolution; else (B, h * w, width).
        dropout: share of what `mid` gives that is dropped in training.
    """

    def __init__(self, width: int, depth: int, embedding: int, inner: int, *, conv: bool = False, dropout: float = 0.0):
        super().__init__()
        steps, half = _STEPS[depth], embedding // 2
        channels = (3, *(half,) * (len(steps) - 1), embedding)
        stages: list[nn.Module] = []
        for number, step in enumerate(steps):
            stages += [nn.ReLU()] if stages else []
            stages.append(nn.Conv2d(channels[number], channels[number + 1], step, step))
        linear: Any = partial(nn.Conv2d, kernel_size=1) if conv else nn.Linear
        self.conditioning1 = nn.Sequential(*stages)
        self.down = nn.Sequential(linear(width, inner), nn.ReLU())
        self.mid = nn.Sequential(linear(inner + embedding, inner), nn.ReLU())
        self.up = nn.Sequential(linear(inner, width))
        nn.init.zeros_(self.up[0].weight)
        nn.init.zeros_(self.up[0].bias)
        self._conv, self._dropout, self._stride = conv, dropout, 4 * steps[1] * (steps[2] if len(steps) > 2 else 1)

    def forward(self, x: Tensor, image: Tensor, multiplier: float) -> Tensor:
        """Args: image: (B, 3, H, W) in [-1, 1], at the size of the image in pixels."""
        import torch
        from torch.nn import functional as F

        missing = [-side % self._stride for side in image.shape[-2:]]
        if any(missing):  # the U-Net rounds such sizes up too
            image = F.pad(image, (0, missing[1], 0, missing[0]), mode="replicate")
        embedded = self.conditioning1(image)
        embedded = embedded if self._conv else embedded.flatten(2).mT
        change = self.mid(torch.cat([embedded, self.down(x)], dim=1 if self._conv else -1))
        change = F.dropout(change, self._dropout, self.training)
        return x + self.up(change) * multiplier


class Lllite(nn.ModuleDict):
    """A `LlliteLayer` for each name in files. Nothing happens while `image` is None.

    Attributes: image: (B, 3, H, W) in [-1, 1], what the next predictions are steered by. multiplier: the strength.
    """

    def __init__(self, layers: Mapping[str, LlliteLayer]):
        super().__init__(layers)
        self.image: torch.Tensor | None = None
        self.multiplier = 1.0

    def attach(self, unet: nn.Module, paths: Mapping[str, str]) -> None:
        """Lets every layer change what goes into its module of the U-Net. Args: paths: by name, of these modules."""
        for name, layer in self.items():
            unet.get_submodule(paths[name]).register_forward_pre_hook(partial(self._steer, layer))

    def _steer(self, layer: LlliteLayer, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.image is None:
            return None
        return (layer(args[0], self.image, self.multiplier), *args[1:])


class Place(NamedTuple):
    """A layer of the U-Net before which there can be a network."""

    path: str
    width: int  # of what goes in
    conv: bool


class LlliteControl(Control):
    """Networks of `--cond_emb_dim` and `--network_dim`, or those of a file."""

    def __init__(self, opts: Options, denoiser: Denoiser):
        super().__init__(opts)
        self._denoiser = denoiser

    def build(self, models: Models) -> nn.Module:
        """See `Control.build`. It is attached to the denoiser of `models`."""
        options = self.opts.method
        embedding, inner = options.cond_emb_dim or EMBEDDING, options.network_dim or WIDTH
        dropout = options.network_dropout or 0.0
        layers, places = {}, places_of(models.denoiser)
        for name, place in places.items():
            trained = _TRAINED.fullmatch(name, len(PREFIX))
            if trained:
                block = trained[1]  # the numbers of SDXL's blocks say the depth: three to a level, and then the middle
                depth = 3 if block is None else 1 + min(int(block) // 3, 2)
                layers[name] = LlliteLayer(place.width, depth, embedding, inner, dropout=dropout)
        return _attached(Lllite(layers), models.denoiser, places)

    def load(self, models: Models, name: str) -> nn.Module:
        """See `Control.load`. It is attached to the denoiser of `models`."""
        with error_prefix(name):
            weights = open_weights(name)
            sizes, places = sizes_of(weights.shapes), places_of(models.denoiser)
            unknown = sorted(sizes.keys() - places.keys())
            if unknown:
                raise UserError(f"{len(unknown)} of its layers have no place in this model: {first_few(unknown)}")
            dropout = self.opts.method.network_dropout or 0.0

            def make() -> nn.Module:
                layers = {
                    name: LlliteLayer(places[name].width, *size, conv=places[name].conv, dropout=dropout)
                    for name, size in sizes.items()
                }
                return Lllite(layers)

            tensors = {key: weights[key].float() for key in weights}
            return _attached(build(make, tensors, "the ControlNet-LLLite"), models.denoiser, places)

    def predict(
        self, models: Models, net: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, batch: Batch
    ) -> Tensor:
        """See `Control.predict`. The control image stays until the backward pass, which may run blocks once more."""
        net.image = None if batch.control is None else batch.control * 2 - 1
        return self._denoiser.predict(models, noisy, timesteps, cond, batch)

    def save(
        self, net: nn.Module, path: Path, *, save_as: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        tensors = deferred_part(SAME_NAMES, net.state_dict(), tensor_specs={}, folder_dtype=None, dtype=dtype)
        if save_as == "safetensors":
            write_safetensors(path, tensors, metadata)
        else:
            write_torch(path, {name: materialise(tensor) for name, tensor in tensors.items()})


def places_of(unet: nn.Module) -> dict[str, Place]:
    """Linear layers and 1x1 convolutions of a U-Net's transformers and resnets, by their names in files."""
    places = {}
    for target in unet_targets(unet):
        (path,) = target.modules
        module = unet.get_submodule(path)
        conv = isinstance(module, nn.Conv2d)
        if target.optional or (conv and (module.kernel_size != (1, 1) or module.stride != (1, 1))):
            continue
        width = module.in_channels if conv else module.in_features
        places[PREFIX + target.key.removeprefix("lora_unet_")] = Place(path, width, conv)
    return places


def _attached(net: Lllite, unet: nn.Module, places: Mapping[str, Place]) -> Lllite:
    net.attach(unet, {name: places[name].path for name in net})
    return net
