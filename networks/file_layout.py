"""The denoiser as files have it: for modules of others that choose and name layers by the original model's structure.

Where the live model's layers are cut or named otherwise than those of files, what such a module finds in the live
model would be saved under names that no reader knows. Here it sees the original's blocks, by class and by path, and in
them the layers that files have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from networks.targets import live_modules

if TYPE_CHECKING:
    from library.types import LoraTarget, Models


class Linear(nn.Linear):
    """One layer of a file, over the live modules that it covers. Whoever replaces its forward changes theirs.

    It keeps no weights of its own. Its name is torch's, because modules look for layers by the names of classes.
    """

    def __init__(self, modules: Sequence[nn.Module], *, swap_halves: bool):
        nn.Module.__init__(self)
        self._live = list(modules)  # a list, so that they are not found inside this layer too
        self._swap = swap_halves
        self._rows = [module.out_features for module in modules]
        self.in_features, self.out_features = modules[0].in_features, sum(self._rows)
        self._input: Tensor | None = None
        self._pieces: list[Tensor | None] = []

    @property
    def weight(self) -> Tensor:
        """(out, in), in the file's order; made when it is asked for."""
        return self._in_file_order(torch.cat([module.weight for module in self._live]), 0)

    @weight.deleter
    def weight(self) -> None:
        """For modules that take the weight over: the live ones stay, unused."""

    @property
    def bias(self) -> Tensor | None:
        """(out,), in the file's order."""
        if self._live[0].bias is None:
            return None
        return self._in_file_order(torch.cat([module.bias for module in self._live]), 0)

    @bias.deleter
    def bias(self) -> None:
        """See `weight`."""

    def forward(self, x: Tensor) -> Tensor:
        # By the class: the instance's forward is replaced, and to keep weights small a layer's class may change.
        outputs = [type(module).forward(module, x) for module in self._live]
        return self._in_file_order(outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), -1)

    def take_over(self) -> None:
        """Makes the live modules give their rows of this layer's output, where its forward has been replaced."""
        if "forward" not in vars(self) and not self._forward_hooks:
            return
        for index, module in enumerate(self._live):
            module.forward = lambda x, index=index: self._piece(index, x)

    def _piece(self, index: int, x: Tensor) -> Tensor:
        """The rows of one live module. All of them are called with the same input, which is worked on once."""
        if self._input is not x or self._pieces[index] is None:
            self._input = x
            self._pieces = list(self._in_file_order(self(x), -1).split(self._rows, -1))
        piece = self._pieces[index]
        assert piece is not None
        self._pieces[index] = None
        if not any(left is not None for left in self._pieces):
            self._input = None  # nothing outlives the last of them
        return piece

    def _in_file_order(self, tensor: Tensor, axis: int) -> Tensor:
        """Also the way back: swapping twice changes nothing."""
        return tensor.roll(tensor.shape[axis] // 2, axis) if self._swap else tensor


def file_layout(targets: Sequence[LoraTarget], models: Models) -> nn.Module | None:
    """The denoiser's targets as a tree of modules, by their places in files; None where the live model is laid out so.

    Live modules that are whole layers of files are themselves in it.
    """
    root = nn.Module()
    for target in targets:
        if target.place is None:
            continue
        modules = live_modules(models, target)
        whole = len(modules) == 1 and not target.swap_halves
        layer = modules[0] if whole else Linear(modules, swap_halves=target.swap_halves)
        *parents, name = target.place.path.split(".")
        node, path = root, ""
        for parent in parents:
            path = f"{path}.{parent}" if path else parent
            if parent not in node._modules:
                kind = dict(target.place.classes).get(path)
                node.add_module(parent, type(kind, (nn.Module,), {})() if kind else nn.Module())
            node = node.get_submodule(parent)
        node.add_module(name, layer)
    return root if len(root._modules) else None


def take_over(layout: nn.Module) -> None:
    """`Linear.take_over` of every layer."""
    for layer in layout.modules():
        if isinstance(layer, Linear):
            layer.take_over()
