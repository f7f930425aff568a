"""Weight files as the tools read them: opened lazily, tensors in a precision and on a device of choice."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.scaled import is_scale, scale_of
from library.errors import UserError
from library.families.shared.reading import Reader, error_prefix
from library.families.shared.recognition import recognise
from library.families.shared.sharded import open_sharded
from library.options.model_files import PRECISIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.spec import ModelKind


def dtype_of(precision: str | None) -> torch.dtype | None:
    """The dtype that a precision's name means, see `PRECISIONS`; None for none."""
    import torch

    return None if precision is None else getattr(torch, PRECISIONS[precision.lower()])


def require_device(name: str) -> torch.device:
    """The device of an option --device. Raises: UserError: there is none of this name here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device: {name} cannot be used here ({first}); use cpu or cuda") from None
    return device


class WeightFile:
    """An open weight file, or several as one, see `open_sharded`.

    Weights that have scales of their own, as in fp8_scaled files, come multiplied by them.

    Raises: UserError: missing, broken, or no weight file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.weights = open_sharded(self.path, mapped=False)  # mapped, it would fill memory with what was read
        self.keys = [key for key in self.weights if not is_scale(key)]
        self.metadata: dict[str, str] = getattr(self.weights, "metadata", {})

    @cached_property
    def kind(self) -> ModelKind:
        return recognise(self.weights)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.weights.shapes[key])

    def dtype(self, key: str) -> torch.dtype:
        """As stored; of weights with separate scales that of the product, bfloat16."""
        import torch

        return self.weights.dtype(key) if scale_of(key, self.weights) is None else torch.bfloat16

    def read(self, key: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, on `device`."""
        scaled = scale_of(key, self.weights) is not None
        with error_prefix(self.path):
            tensor = Reader(self.weights, dtype).take([key])[key] if scaled else self.weights[key]
        return tensor.to(device, dtype)
