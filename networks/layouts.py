"""Names of tensors in network files of other programs, as kohya's: `lora_<part>_<path with underscores>.<tensor>`.

A path may be that of the original model or that of diffusers' or transformers' classes; `networks.files` knows both for
every layer. No torch here.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_KOHYA = re.compile(r"(lora|oft|lycoris)_(unet|te\d*)_")
# Beginnings of names, and kohya's in their place.
_PARTS = (
    (
        re.compile(r"(model\.)?diffusion_model\.|transformer\.|unet\.|lora_(transformer|prior)_|lycoris_(?=\w+\.)"),
        "lora_unet_",
    ),
    (re.compile(r"text_encoder\.|(text_encoders\.)?clip_[lh]\.(transformer\.)?"), "lora_te1_"),
    (re.compile(r"text_encoder_2\.|(text_encoders\.)?clip_g\.(transformer\.)?"), "lora_te2_"),
    (re.compile(r"text_encoder_3\.|(text_encoders\.)?t5(xxl)?\.(transformer\.)?"), "lora_te3_"),
)
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# Ends of names: of diffusers and PEFT in several ages, xlabs, OneTrainer.
_MATRIX = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|\.lora_(?P<kohya>down|up)(?:\.weight)?"
    r"|\.lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|_lora(?P<stream>[12]?)\.(?P<processor>down|up)\.weight)"
)
_OTHER = re.compile(
    r"(?P<layer>.+?)\.(?P<tensor>alpha|dora_scale|lora_mid\.weight|diff|diff_b|w_norm|b_norm|set_weight|rescale|on_input"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks(?:\.\d+)?|oft_R\.weight|boft_[Rs]|[ab][12]\.weight|reshape_weight)"
)
# Norms of query and key whole: in BFL's control LoRAs, in ComfyUI's of these, and in diffusers'.
_NORM = re.compile(r"(?P<layer>.+?\.(?:query|key)_norm)\.(?:scale|(?:scale\.)?set_weight)")
_DIFFUSERS_NORM = re.compile(r"(?P<layer>.+?\.norm_(?:added_)?[qk])\.weight")
_BIAS = re.compile(r"(?P<layer>.+?)\.lora_B(?:\.default)?\.bias")
_MAGNITUDE = re.compile(r"(?P<layer>.+?)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_STREAMS = {"1": "img", "2": "txt"}  # of xlabs' FLUX blocks
_NO_PATH = ("img_in", "txt_in")  # layers outside of all blocks, whose names in BFL's files are single words
PEFT_ROTATION = "peft_R.weight"  # of PEFT's own files, which differ in convolutions; see `layers/input_rotations.py`
SET_WEIGHT = "set_weight"  # ComfyUI's name for a tensor that takes a weight's place

# Layouts by who writes them: how names begin and end.
LAYOUTS = {
    "kohya's": ("lora_unet_", ".lora_down.weight"),
    "LyCORIS'": ("lycoris_unet_", ".lokr_w1"),
    "OneTrainer's": ("lora_transformer_", ".lora_down.weight"),
    "ComfyUI's": ("diffusion_model.", ".lora_up.weight"),
    "diffusers' and ai-toolkit's": ("transformer.", ".lora_A.weight"),
    "diffusers' for U-Nets": ("unet.", ".lora_A.weight"),
    "PEFT's": ("base_model.model.", ".lora_A.weight"),
    "xlabs'": ("", ".processor.qkv_lora1.down.weight"),
    "BFL's": ("", ".lora_B.bias"),
}


def nearest_layout(name: str) -> str:
    """The known layout whose names are most like this one, for messages."""

    def likeness(begin: str, end: str) -> float:
        at_end = SequenceMatcher(None, end, name[-len(end) :]).ratio()
        return at_end + (SequenceMatcher(None, begin, name[: len(begin)]).ratio() if begin else 0.5)

    label = max(LAYOUTS, key=lambda label: likeness(*LAYOUTS[label]))
    return f"{label}, {'<path>'.join(LAYOUTS[label])}"


def kohya_name(name: str) -> str:
    """A tensor's name as kohya's files have it; unchanged where it is of no layout that is known here."""
    stripped = name.removeprefix("base_model.model.")
    match, part = None, ""
    if not _KOHYA.match(stripped):
        found = ((pattern.match(stripped), part) for pattern, part in _PARTS)
        match, part = next(((match, part) for match, part in found if match), (None, "lora_unet_"))
    rest = stripped[match.end() :] if match else stripped
    split = _layer_and_tensor(rest)
    known = _KOHYA.match(stripped) is not None
    # A layer of kohya's files has no dots; one without a known beginning is a path, and so has some.
    if split is None or (known and "." in split[0]):
        return name
    if not known and match is None and "." not in split[0] and split[0] not in _NO_PATH:
        return name
    tensor = PEFT_ROTATION if name != stripped and split[1] == "oft_R.weight" else split[1]
    return f"{part}{split[0].replace('.', '_')}.{tensor}"


def _layer_and_tensor(name: str) -> tuple[str, str] | None:
    """The path of a layer and the name of its tensor; None: neither is known."""
    matrix = _MATRIX.fullmatch(name)
    if matrix is None:
        other = _OTHER.fullmatch(name)
        others = ((_MAGNITUDE, "dora_scale"), (_BIAS, "diff_b"), (_NORM, SET_WEIGHT), (_DIFFUSERS_NORM, SET_WEIGHT))
        for pattern, tensor in others:
            found = pattern.fullmatch(name)
            if found is not None:
                return found["layer"], tensor
        return (other["layer"], other["tensor"]) if other is not None else None
    layer = matrix["layer"]
    side = next(matrix[group] for group in ("peft", "kohya", "diffusers", "processor") if matrix[group])
    if matrix["processor"]:
        head, _, last = layer.rpartition(".processor.")
        if matrix["stream"]:
            layer = f"{head}.{_STREAMS[matrix['stream']]}_attn.{last}"
        else:
            layer = f"{head}.{'to_out.0' if last == 'to_out' else last}"
    return layer, f"lora_{_SIDES[side]}.weight"
