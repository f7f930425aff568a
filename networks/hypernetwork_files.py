"""Files of hypernetworks: a torch file with, for each width, the tensors of two networks, and facts about them.

    {320: [<of keys>, <of values>], 640: ..., "layer_structure": [1, 2, 1], "activation_func": "relu", ...}

Tensors are called ``linear.<number>.weight`` and ``.bias``, where activations and dropouts count too; the oldest files
have ``linear1`` and ``linear2``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import file_format
from library.checkpoints.unpickling import read_specs

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR = re.compile(r"linear\.?(\d+)\.(weight|bias)")


def is_hypernetwork(content: Any) -> bool:
    """Whether this is what a hypernetwork's file holds."""
    pairs = widths(content) if isinstance(content, dict) else {}
    return bool(pairs) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(one, dict) for one in pair)
        for pair in pairs.values()
    )


def is_hypernetwork_file(path: str | Path) -> bool:
    """The same of a file, whose tensors are not read. No torch here. Raises: UserError: missing, or no weight file."""
    if file_format(path) != "torch":
        return False
    try:
        return is_hypernetwork(read_specs(Path(path)))
    except Exception:  # whatever a damaged pickle leads to; loading says what is wrong
        return False


def widths(content: Mapping[Any, Any]) -> dict[int, Any]:
    """The entries for widths, all others being facts."""
    return {key: value for key, value in content.items() if type(key) is int}


def in_order(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A network's layers one after another, each with its weight and bias, whatever numbers they have."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _TENSOR.fullmatch(name)
        if found:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
    return [layers[number] for number in sorted(layers)]


def file_content(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], name: str, metadata: Mapping[str, str]
) -> dict[Any, Any]:
    """What a file holds.

    Args:
        tensors: by ``<width>.<0 for keys, 1 for values>.linear.<number>.<weight or bias>``, in the networks' order.
        facts: of the networks, by the names that files have.
        name: of the file, without its ending.
        metadata: of the run, of which the format has places for little.
    """
    pairs: dict[int, list[dict[str, Tensor]]] = {}
    for path, tensor in tensors.items():
        width, side, rest = path.split(".", 2)
        pairs.setdefault(int(width), [{}, {}])[int(side)][rest] = tensor
    whole_hash = metadata.get("ss_new_sd_model_hash")
    return {
        **pairs,
        "step": int(metadata.get("ss_steps", 0)),
        "name": name,
        "sd_checkpoint": whole_hash and whole_hash[:10],  # as the web UI abbreviates it
        "sd_checkpoint_name": metadata.get("ss_sd_model_name"),
        **facts,
        # Dropouts are for training alone. Named here, they would have numbers among the layers.
        "use_dropout": False,
        "last_layer_dropout": False,
    }
