"""What is in files of ControlNet-LLLite, by names and shapes alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from library.errors import UserError

PREFIX = "lllite_unet_"  # before every layer's name


class Size(NamedTuple):
    """The numbers that decide the shapes of a layer's network."""

    depth: int  # which convolutions embed the control image, see `LlliteLayer`
    embedding: int  # channels of the embedded control image
    inner: int


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Size]:
    """By layer, the sizes of its network. Raises: UserError: this is no such file, or a layer lacks a part."""
    names = list(dict.fromkeys(key.partition(".")[0] for key in shapes))
    if not names or not all(name.startswith(PREFIX) for name in names):
        raise UserError("this is no ControlNet-LLLite")
    sizes = {}
    for name in names:
        try:
            inner, both = shapes[f"{name}.down.0.weight"][0], shapes[f"{name}.mid.0.weight"][1]
            last = shapes[f"{name}.conditioning1.2.weight"][-1]  # the side of the second convolution's kernel
        except KeyError as error:
            raise UserError(f"it lacks the tensor {error.args[0]}") from None
        depth = 3 if f"{name}.conditioning1.4.weight" in shapes else 2 if last == 4 else 1
        sizes[name] = Size(depth, both - inner, inner)
    return sizes
