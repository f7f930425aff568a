"""Deep Shrink by hooks: features of a U-Net become smaller before one of its input blocks, and large on the way up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.shared.unet import unet_stages

if TYPE_CHECKING:
    from torch import Tensor, nn

SetDepth = Callable[["int | None"], None]


class _Shrinking:
    """What the hooks of one U-Net, or of one ControlNet of it, know."""

    def __init__(self, net: nn.Module, ratio: float):
        self.depth: int | None = None  # the input block before which features become smaller now
        self._ratio = ratio
        self._sizes: list[Any] = []  # of the sample, and behind each input block
        self.inputs, self.outputs = unet_stages(net)
        # What only one of the two has.
        levels = getattr(net, "up_blocks", ())
        self._upsamplers = [upsampler for level in levels for upsampler in level.upsamplers or ()]
        self._embedding = getattr(net, "controlnet_cond_embedding", None)

    def attach(self) -> Iterator[Any]:
        """The handles of the hooks, which take them off again."""
        for number, modules in enumerate(self.inputs):
            yield modules[0].register_forward_pre_hook(partial(self._before_input, number))
            yield modules[-1].register_forward_hook(self._after_input)
        for number, modules in enumerate(self.outputs):
            yield modules[-1].register_forward_hook(partial(self._after_output, len(self.inputs) - 1 - number))
        for upsampler in self._upsamplers:
            yield upsampler.register_forward_pre_hook(self._before_upsampler)
        if self._embedding is not None:
            yield self._embedding.register_forward_hook(self._after_embedding)

    def _before_input(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if number == 0:
            self._sizes = [args[0].shape[-2:]]
        if number != self.depth or min(int(side * self._ratio) for side in args[0].shape[-2:]) < 1:
            return None
        return _interpolate(args[0], scale_factor=self._ratio), *args[1:]

    def _after_input(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._sizes.append(_first(output).shape[-2:])

    def _before_upsampler(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Upsamplers double the size: they are not asked for that of the next skip connection, which may be larger."""
        return None if self.depth is None else args[:1]

    def _after_output(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Args: number: of the input block whose features this output block has read; then come those before it."""
        features = _first(output)
        if self.depth is None or features.shape[-2:] == self._sizes[number]:
            return None
        features = _interpolate(features, size=self._sizes[number])
        return (features, *output[1:]) if isinstance(output, tuple) else features

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """What a ControlNet has made of its image is added to what comes out of its first input block."""
        return None if output.shape[-2:] == self._sizes[1] else _interpolate(output, size=self._sizes[1])


@contextmanager
def shrinking(nets: Sequence[nn.Module], ratio: float) -> Iterator[SetDepth]:
    """Inside, what this gives says before which input block features become smaller; None: before none.

    Args:
        nets: a UNet2DConditionModel and the ControlNets that act on it.
        ratio: of the sides, above 0, at most 1.
    Raises: UserError: by what it gives: there is no such input block.
    """
    parts = [_Shrinking(net, ratio) for net in nets]

    def set_depth(depth: int | None) -> None:
        blocks = len(parts[0].inputs)
        if depth is not None and depth >= blocks:
            raise UserError(f"Deep Shrink: this model's U-Net has the input blocks 0 to {blocks - 1}, and none {depth}")
        for part in parts:
            part.depth = depth

    with ExitStack() as stack:
        for handle in (handle for part in parts for handle in part.attach()):
            stack.callback(handle.remove)
        yield set_depth


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _interpolate(features: Tensor, **size: Any) -> Tensor:
    from torch.nn import functional

    wide = functional.interpolate(features.float(), mode="bicubic", align_corners=False, **size)
    return wide.to(features.dtype)
