"""Format and model parts of a network file, by the names of its tensors. No torch here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from library.checkpoints.embeddings import BUNDLED
from library.errors import UserError
from networks.layouts import kohya_name, nearest_layout
from networks.registry import TYPES
from networks.spec import NetworkType

SHOWN = 3  # of many names, in messages
_ORDINARY = "give a network file"
_LYCORIS = "--network_module=networks.lycoris continues from it"
_CONTROL = "gen_img.py generates with it, and --base_weights and the merging scripts merge it"
# The first pattern that is found in any name decides: the format, and what can be done.
FORMATS = (
    (r"\.hada_w1_a$", "LoHa", _LYCORIS),
    (r"\.lokr_w1(_a)?$", "LoKr", _LYCORIS),
    (r"\.(oft_blocks|oft_diag)$", "OFT", _LYCORIS),
    (r"\.(oft|peft)_R\.weight$", "OFTv2", "--network_module=networks.oft_v2 continues from it"),
    (r"\.boft_R$", "BOFT of inputs", "--network_module=networks.boft continues from it"),
    (r"\.on_input$", "IA3", _LYCORIS),
    (r"\.[ab]1\.weight$", "GLoRA", _LYCORIS),
    (
        r"norm\.(query|key)_norm\.scale$|\.set_weight$",
        "a control LoRA, whose model takes an image beside the latents",
        _CONTROL,
    ),
    (r"\.(diff|diff_b)$", "differences of weights or biases", _LYCORIS),
    (r"\.w_norm$", "LyCORIS with trained norms", _LYCORIS),
    (r"\.lora_mid\.weight$", "LoCon in Tucker form", _LYCORIS),
    (r"\.dora_scale$", "DoRA", _LYCORIS),
    (r"^bundle_emb\.", "embeddings without any layer", _ORDINARY),
    (r"^(emb_params|clip_[lg]|string_to_param.*)$", "a Textual Inversion embedding", _ORDINARY),
    (r"^model\.diffusion_model\.", "a whole model", _ORDINARY),
)
# Layer names of the kohya layout begin so; what stands behind the prefix is the layer.
_PART = re.compile(r"(?:lora|oft|lycoris)_(?P<part>unet|transformer|prior|te\d*)(?=_)")


def foreign_format(names: Iterable[str]) -> tuple[str, str] | None:
    """The format of a file with these tensor names, and what to do with it; None for none that is known here."""
    text = "\n".join(names)
    found = (entry for entry in FORMATS if re.search(entry[0], text, re.MULTILINE))
    return next(((name, advice) for _, name, advice in found), None)


def require_types(path: Path, names: Iterable[str], types: Sequence[NetworkType] = TYPES) -> None:
    """Raises: UserError: a layer of a file with these tensor names is of none of `types`; the message names its format.

    Args: types: those that can be read; all that are known here by default.
    """
    names = list(names)
    layers: dict[str, set[str]] = {}
    for name in names:
        if name.startswith(BUNDLED):
            continue
        layer, _, tensor = kohya_name(name).partition(".")
        layers.setdefault(layer, set()).add(tensor)
    others = [
        f"{layer}.{tensor}"
        for layer, tensors in layers.items()
        if not any(kind.reads(frozenset(tensors)) for kind in types)
        for tensor in sorted(tensors - {"alpha"} or tensors)
    ]
    if not layers:
        raise UserError(f"{path}: holds no layer of a network.{named_format(names)}")
    if not others:
        return
    foreign = foreign_format(names)
    nearest = f"; the nearest layout that is read is {nearest_layout(others[0])}"
    why = f": this is {foreign[0]}; {foreign[1]}" if foreign else nearest
    labels = " or ".join(dict.fromkeys(kind.label for kind in types))
    raise UserError(f"{path}: holds {', '.join(others[:SHOWN])}, which is not {labels} of this kind{why}")


def named_format(names: Iterable[str]) -> str:
    """A sentence, after a space, that names the format of a file of which nothing fits; empty where it is not known."""
    found = foreign_format(names)
    return f" Its names are those of {found[0]}: {found[1]}." if found else ""


def require_places(path: Path, layers: Iterable[str], known: Collection[str]) -> None:
    """Refuses a file of which a whole part, the denoiser or a text encoder, has no layer in this model.

    Files of which nothing at all fits are left to their readers, which say more about those.

    Args:
        layers: names of the file's layers.
        known: all names that layers of this model have in files.
    Raises: UserError.
    """
    layers = list(layers)
    parts = {layer: match[0] if (match := _PART.match(layer)) else "" for layer in layers}
    sizes, fitting = Counter(parts.values()), {parts[layer] for layer in layers if layer in known}
    lost = [part for part in sizes if part and part not in fitting]
    if not lost or not fitting:
        return
    raise UserError(
        *(
            f"{path}: its {sizes[part]} layers {part}_* "
            f"({'a text encoder' if '_te' in part else 'the denoiser'}) find no place in this model, only "
            f"{sum(sizes.values()) - sum(sizes[other] for other in lost)} of {len(layers)} layers could be used; give "
            "a file that was made for this kind of model"
            for part in lost
        )
    )
