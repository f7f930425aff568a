"""What is in network files: networks/check_lora_weights.py, networks/lora_interrogator.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.reading import open_weights, read_metadata
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.clip import encode_clip
from library.families.shared.finding import family_of
from library.families.shared.targets import clip_targets
from library.model_tools.network_io import read_network
from library.options.base import Options
from library.options.network_tools import CheckWeightsOptions
from library.options.parsing import parse_options
from library.preparation.captioning.pretrained import placed
from library.preparation.common.summary import show
from library.registry import groups_for
from library.runtime.logs import LOGGER, progress
from library.types import Models
from networks.build import merge
from networks.file_names import named_format
from networks.files import NetworkFile, names_of
from networks.layers.locon import DOWN, UP
from networks.layouts import kohya_name
from networks.registry import type_of

if TYPE_CHECKING:
    from torch import nn

SHOWN = 100  # tokens


def check_weights(opts: Options) -> None:
    """Prints name, shape, dtype and size of the values of each matrix of a network file, and of what is wrong with it.

    Raises: UserError: it is no file of a network; or some of its values are no numbers, after all are shown.
    """
    own: CheckWeightsOptions = opts.check_weights
    weights = open_weights(own.file)
    layers: dict[str, set[str]] = {}
    for name in weights:
        layer, _, tensor = kohya_name(name).partition(".")
        layers.setdefault(layer, set()).add(tensor)
    if not any(map(type_of, layers.values())):
        raise UserError(f"{own.file}: has no layer of a network.{named_format(weights)}")
    broken = []
    for name in weights:
        tensor = weights[name]
        values = tensor.double().abs()
        if not values.isfinite().all():
            broken.append(name)
        if own.show_all_keys or kohya_name(name).endswith((DOWN, UP)) or name in broken:
            dtype = str(tensor.dtype).removeprefix("torch.")
            size = f"mean |x| {values.mean():.4g}, max |x| {values.max():.4g}" if tensor.numel() else "empty"
            show(f"{name}: {'x'.join(map(str, tensor.shape)) or 'number'} {dtype}, {size}")
    kinds: dict[str, int] = {}
    for tensors in layers.values():
        kind = type_of(tensors)
        label = kind.label if kind else "of no known type"
        kinds[label] = kinds.get(label, 0) + 1
    show(f"{len(layers)} layers: {', '.join(f'{count} {label}' for label, count in kinds.items())}")
    for key in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version"):
        if key in (metadata := read_metadata(own.file)):
            show(f"{key}: {metadata[key]}")
    if broken:
        raise UserError(f"{own.file}: {len(broken)} tensors hold NaN or infinite values, the first is {broken[0]}")


def interrogate(opts: Options) -> None:
    """Prints the tokens whose encoding a network changes most, for each CLIP encoder that it adapts.

    Raises: UserError: the network adapts none, or was made for another model.
    """
    own = opts.interrogate
    source = read_network(own.model)
    name = family_of(own.base_model)
    skip = [] if own.clip_skip is None else [f"--clip_skip={own.clip_skip}"]
    arguments = [f"--pretrained_model_name_or_path={own.base_model}", *(["--v2"] if own.v2 else []), *skip]
    model_opts = FAMILIES[name].complete_options(parse_options(groups_for(name, "network"), arguments))
    LOGGER.info("loading %s", own.base_model)
    models = FAMILIES[name].adapter(model_opts).loader.load(texts_only=True)
    file = NetworkFile(source.path, source.entries)
    found = False
    for part, encoder in models.text_encoders.items():
        targets = clip_targets(encoder, part) if "CLIP" in type(encoder).__name__ else []
        if not any(name in source.entries for target in targets for name in names_of(target)):
            continue
        found = True
        device = placed()
        encoder.to(device)
        ids = _words(models.tokenizers[part])
        before = list(_states(encoder, ids, own))
        merge(targets, Models(models.denoiser, {part: encoder}, {}, None), file, 1.0)
        changes = [(new - old).abs().mean((1, 2)) for old, new in zip(before, _states(encoder, ids, own), strict=True)]
        sizes, order = torch.cat(changes).sort(descending=True)
        show(f"{part}: tokens by the mean change of the encoder's states")
        for place, (size, number) in enumerate(zip(sizes[:SHOWN].tolist(), order[:SHOWN].tolist(), strict=True)):
            token = ids[number][1]
            show(f"[{place:3d}] {token:5d} {models.tokenizers[part].convert_ids_to_tokens(token):<20} {size:.5f}")
    if not found:
        raise UserError(f"{own.model}: adapts no text encoder, so that there is nothing to ask")


def _words(tokenizer: Any) -> list[list[int]]:
    """Every token by itself, between the ones that begin and end a text."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [
        [tokenizer.bos_token_id, token, tokenizer.eos_token_id]
        for token in range(len(tokenizer))
        if token not in special
    ]


def _states(encoder: nn.Module, ids: list[list[int]], own: Any) -> Iterator[Tensor]:
    """The states of token and end, a batch at a time: (batch, 2, width), on the CPU."""
    with progress(len(ids), "encoding", " tokens") as bar, torch.no_grad():
        for start in range(0, len(ids), own.batch_size):
            batch = torch.tensor(ids[start : start + own.batch_size], device=encoder.device)[:, None]
            yield encode_clip(encoder, batch, own.clip_skip)[:, 1:].float().cpu()
            bar.update(len(batch))
