"""Network files in the layouts of other programs: networks/convert_lora.py, networks/convert_flux_lora.py.

A layer has a name in each layout: kohya's, with underscores, which web UIs and ComfyUI read; diffusers', whose classes
have query, key and value apart where the original of some models has them in one; and the original names behind
`diffusion_model.`, which ComfyUI reads. See `library.checkpoints.layer_names`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.layer_names import PartNames
from library.errors import UserError
from library.families.registry import FAMILIES
from library.model_tools.network_io import folded, named, read_network, scale_of, without_core, write_network
from library.model_tools.network_layers import Layout, Placed, layout_of, parts_of, placed, require_lora
from library.model_tools.network_metadata import rank_metadata
from library.model_tools.output import require_output
from library.model_tools.weights import dtype_of
from library.options.base import Options
from library.options.model_tools import WEIGHT_ENDINGS
from library.options.network_tools import LAYOUTS, ConvertOptions, ConvertPairOptions
from library.runtime.logs import LOGGER
from networks.files import ADAPTER_METADATA, PREFIXES, Entries
from networks.fused import ALPHA, DORA
from networks.layers.change import BIAS
from networks.layers.locon import DOWN, UP
from networks.layouts import SET_WEIGHT

_INPUTS = {name: count for family in FAMILIES.values() for name, count in family.input_layers.items()}
_LEVEL = "text_model."  # of CLIP; transformers' newer classes do not have it, and PEFT finds paths by their ends
_PROJECTIONS = ("proj_in", "proj_out")
_PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight", BIAS: "lora_B.bias", DORA: "lora_magnitude_vector"}


def convert_lora(opts: Options) -> None:
    """Writes --model in the layout --to. Raises: UserError: a file of no family, or what the layout cannot hold."""
    own: ConvertOptions = opts.convert
    convert_file(
        own.model, own.save_to, own.to, family=own.family, save_precision=own.save_precision, fold=own.fold_alpha
    )


def convert_pair(opts: Options, family: str) -> None:
    """Writes --src_path, which has the layout --src, in the layout --dst; alphas go into matrices where it has none.

    Raises: UserError: as `convert_file`.
    """
    own: ConvertPairOptions = opts.convert_pair
    convert_file(
        own.src_path,
        own.dst_path,
        LAYOUTS[own.dst],
        flag="--dst_path",
        family=family,
        source_layout=LAYOUTS[own.src],
        fold=True,
    )


def convert_file(
    path: str,
    save_to: str,
    to: Layout,
    *,
    flag: str = "--save_to",
    family: str | None = None,
    source_layout: Layout | None = None,
    save_precision: str | None = None,
    fold: bool = False,
) -> None:
    """Writes a network file in another layout.

    Args:
        flag: the option that gives `save_to`.
        family: the name of the model family; None: the one that has the file's layers.
        source_layout: what the file must have; None: any.
        fold: alphas go into the matrices of a file of diffusers, in place of its metadata.
    Raises: UserError: a file of no family, or what the layout cannot hold.
    """
    require_output(flag, save_to, [path], WEIGHT_ENDINGS)
    source = read_network(path)
    found = layout_of(source.names.values())
    if source_layout is not None and found != source_layout:
        raise UserError(f"{path}: has the names of {found or 'another layout'}, not of {source_layout}")
    parts = parts_of(source, family)
    tensors, about = converted(source.entries, parts, to, fold=fold)
    metadata = {key: value for key, value in source.metadata.items() if key != ADAPTER_METADATA} | about
    write_network(save_to, tensors, metadata, dtype_of(save_precision))
    LOGGER.info("%s: %d layers of %s in the layout of %s", save_to, len(source.entries), path, to)


def converted(
    entries: Entries, parts: Sequence[PartNames], to: Layout, *, fold: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in a layout, and the metadata that it needs.

    Args: fold: see `convert_file`.
    Raises: UserError: what the layout cannot hold.
    """
    layers = placed(entries, parts)
    if to == "diffusers":
        return _for_diffusers(layers, fold=fold)
    tensors, whole = {}, {}
    for name, own in layers.items():
        with named(name):
            whole[name] = own.joined()
        if DOWN in whole[name] and ALPHA not in whole[name]:
            whole[name] = {**whole[name], ALPHA: torch.tensor(float(len(whole[name][DOWN])))}
        shown = own.layer.comfyui if to == "comfyui" else name.replace(PREFIXES[0], own.prefix, 1)
        tensors |= {f"{shown}.{tensor}": value for tensor, value in whole[name].items()}
        if DOWN in whole[name] and whole[name][DOWN].shape[1] > _INPUTS.get(name, math.inf):
            # By which ComfyUI knows that the layer grows.
            shape = [len(whole[name][UP]), whole[name][DOWN].shape[1]]
            tensors[f"{shown}.reshape_weight"] = torch.tensor(shape)
    return tensors, rank_metadata(whole)


def _for_diffusers(layers: Mapping[str, Placed], *, fold: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    by_part: dict[str, Entries] = {}  # of each part of the pipeline, the entries by the modules' paths
    for name, own in layers.items():
        with named(name):
            for place, entry in own.separate().items():
                path = own.layer.modules[place]
                if SET_WEIGHT in entry:
                    tensors[f"{own.layer.diffusers(place)}.weight"] = entry[SET_WEIGHT]
                    continue
                require_lora(entry)
                entry = _shaped(without_core(entry), own.layer.part, path)
                if fold:
                    entry = folded(entry)
                if BIAS in entry:  # PEFT multiplies it by the scale, too
                    entry = {**entry, BIAS: entry[BIAS].float() / scale_of(entry)}
                by_part.setdefault(own.layer.part.diffusers, {})[path.removeprefix(_LEVEL)] = entry
                for tensor, peft in _PEFT_NAMES.items():
                    if tensor in entry:
                        tensors[f"{own.layer.diffusers(place)}.{peft}"] = entry[tensor]
    for part, modules in by_part.items():
        if len({DORA in entry for entry in modules.values()}) > 1:
            raise UserError(f"some layers of {part} are DoRA and some are not, which PEFT does not have")
    if all(scale_of(entry) == 1 for modules in by_part.values() for entry in modules.values()):
        return tensors, {}
    config = {f"{part}.{key}": value for part, modules in by_part.items() for key, value in _peft(modules).items()}
    return tensors, {ADAPTER_METADATA: json.dumps(config, sort_keys=True)}


def _shaped(entry: dict[str, Tensor], part: PartNames, path: str) -> dict[str, Tensor]:
    """Shapes as PEFT's layers have them."""
    if path.rpartition(".")[2] in _PROJECTIONS and part.linear_projections is not None:
        ends = () if part.linear_projections else (1, 1)
        entry = {**entry, **{name: entry[name].reshape(*entry[name].shape[:2], *ends) for name in (DOWN, UP)}}
    if DORA in entry:
        size = (1, -1, 1, 1) if entry[DOWN].dim() == 4 else (-1,)
        entry = {**entry, DORA: entry[DORA].reshape(size)}
    return entry


def _peft(modules: Entries) -> dict[str, Any]:
    """PEFT's LoraConfig of the layers of one part: what most have, and patterns for the others."""
    ranks = {path: len(entry[DOWN]) for path, entry in modules.items()}
    alphas = {path: scale_of(entry) * ranks[path] for path, entry in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
        "use_dora": any(DORA in entry for entry in modules.values()),
        **({"lora_bias": True} if any(BIAS in entry for entry in modules.values()) else {}),
    }
