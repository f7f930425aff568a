"""Which Stable Diffusion a file is, told from names and shapes alone: no torch, so that it can be asked at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import read_header
from library.errors import UserError
from library.families.sd.keymap import CLIP, OPEN_CLIP, UNET, VAE

if TYPE_CHECKING:
    from library.options.base import Options

Shapes = Mapping[str, tuple[int, ...]]

SD1, SD2, VAE_ONLY = "a Stable Diffusion 1.x model", "a Stable Diffusion 2.x model", "a VAE"
UNKNOWN = "not a model that is known here"
SD1_HEADS, SD2_HEAD_WIDTH = 8, 64  # shapes cannot tell; the real models' rule

# The first line whose pattern is found in any key names the file.
SIGNS = (
    (r"^lora_|\.lora_(down|up|A|B)\.|\.hada_w1_a$|\.lokr_w1|\.oft_(blocks|diag)$", "a LoRA (or similar network) file"),
    (r"^emb_params$|^clip_[lg]$|^string_to_param", "a Textual Inversion embedding"),
    (r"^conditioner\.embedders\.", "an SDXL model"),
    (r"joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"double_blocks\.\d+\.|^transformer_blocks\.\d+\.attn\.add_k_proj", "a FLUX model"),
    (r"^control_model\.|^input_hint_block\.|^controlnet_", "a ControlNet"),
    (r"^cond_stage_model\.model\.", SD2),
    (r"^cond_stage_model\.transformer\.", SD1),
    (r"^model\.diffusion_model\.|^input_blocks\.", "a U-Net without a text encoder"),
    (r"^(unet\.)?(down_blocks|up_blocks)\.", "a Diffusers U-Net by itself"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|mid_block)", VAE_ONLY),
    (r"^(text_model\.)?encoder\.layers?\.", "a text encoder by itself"),
    (r"^encoder\.block\.\d+\.", "a T5 text encoder"),
)
PIPELINES = {
    "StableDiffusionXL": "an SDXL model",
    "StableDiffusion3": "a Stable Diffusion 3 model",
    "Flux": "a FLUX model",
}


def recognise(keys: Iterable[str]) -> str:
    """What a weight file is, in words, from its key names."""
    text = "\n".join(keys)
    return next((label for sign, label in SIGNS if re.search(sign, text, re.MULTILINE)), UNKNOWN)


def mismatch(kind: str, v2: bool) -> str | None:
    """Why a file of this kind is not the model that is asked for; None when it is."""
    if kind == (SD2 if v2 else SD1):
        return None
    if kind == SD2:
        return f"this is {SD2}; add --v2"
    if kind == SD1:
        return f"this is {SD1}; remove --v2"
    return f"this is {kind}; a whole Stable Diffusion 1.x or 2.x model is needed here"


def check_paths(opts: Options) -> list[str]:
    """Every problem with the paths of model and VAE that can be seen without loading anything.

    Reads only the headers of .safetensors files and the small JSON files of Diffusers folders.
    """
    model, vae = opts.model.pretrained_model_name_or_path, opts.model.vae
    if not model:
        return ["--pretrained_model_name_or_path: name a model: a file, a Diffusers folder or a hub id"]
    problems = [_check(model, lambda path: _model_problem(path, opts.family.v2), "--pretrained_model_name_or_path")]
    if vae:
        problems.append(_check(vae, _vae_problem, "--vae"))
    return [problem for problem in problems if problem]


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file or folder here could be a model on the hub: `owner/model`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not re.search(
        r"\.(safetensors|ckpt|pth?|bin)$", name, re.IGNORECASE
    )


def _check(name: str, problem_of: Any, flag: str) -> str | None:
    path = Path(name)
    if not path.exists():
        if is_hub_id(name):
            return None
        return f"{flag}: {name}: no such file or folder (and not a hub id of the form owner/model)"
    try:
        problem = problem_of(path)
    except UserError as error:
        return f"{flag}: {error}"
    return problem and f"{flag}: {name}: {problem}"


def _model_problem(path: Path, v2: bool) -> str | None:
    if path.is_dir():
        return folder_problem(path, v2)
    if path.suffix.lower() != ".safetensors":
        return None  # a pickle says nothing before it is loaded
    return mismatch(recognise(read_header(path)[1]), v2)


def folder_problem(path: Path, v2: bool) -> str | None:
    """Why a Diffusers folder is not the model that is asked for; None when it is."""
    if not (path / "unet" / "config.json").is_file():
        kind = _pipeline_kind(path)
        return f"this is {kind}" if kind else "not a Diffusers model folder: unet/config.json is missing"
    kind = _pipeline_kind(path) or folder_kind(path)
    return mismatch(kind, v2)


def folder_kind(path: Path) -> str:
    """SD1 or SD2, by the activation function of the folder's text encoder."""
    if (path / "text_encoder_2").is_dir():
        return PIPELINES["StableDiffusionXL"]
    return SD2 if _read_json(path / "text_encoder" / "config.json").get("hidden_act") == "gelu" else SD1


def _pipeline_kind(path: Path) -> str | None:
    index = path / "model_index.json"
    name = str(_read_json(index).get("_class_name")) if index.is_file() else ""
    return next((kind for start, kind in PIPELINES.items() if name.startswith(start)), None)


def _vae_problem(path: Path) -> str | None:
    if path.is_dir():
        is_vae = (path / "vae" / "config.json").is_file() or (path / "config.json").is_file()
        return None if is_vae else "holds neither vae/config.json nor a VAE's config.json"
    if path.suffix.lower() != ".safetensors":
        return None
    kind = recognise(read_header(path)[1])
    return None if kind in (SD1, SD2, VAE_ONLY) else f"this is {kind}; a VAE or a Stable Diffusion model is needed here"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the Diffusers folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


@dataclass(frozen=True)
class UnetShape:
    """What the names and shapes of a U-Net in a single file tell about it."""

    widths: tuple[int, ...]  # channels of each level
    layers: int  # resnets of a level on the way down
    attention: tuple[bool, ...]  # whether a level has transformers
    depths: tuple[int, ...]  # transformer blocks of a level's transformers
    context: int  # width of the text states
    in_channels: int
    out_channels: int
    linear_projection: bool

    def diffusers_config(self, v2: bool) -> dict[str, Any]:
        """UNet2DConditionModel's arguments. `attention_head_dim` is its odd word for the number of heads.

        Raises: UserError: a width that does not divide into heads.
        """
        unit = SD2_HEAD_WIDTH if v2 else SD1_HEADS
        if any(width % unit for width in self.widths):
            raise UserError(
                f"the U-Net's widths {self.widths} are not multiples of {unit}, so they have no whole heads"
            )
        down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in self.attention)
        up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(self.attention))
        return {
            "sample_size": 64,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "down_block_types": down,
            "up_block_types": up,
            "cross_attention_dim": self.context,
            "transformer_layers_per_block": self.depths,
            "attention_head_dim": tuple(w // SD2_HEAD_WIDTH for w in self.widths) if v2 else SD1_HEADS,
            "use_linear_projection": self.linear_projection,
        }


def unet_shape(shapes: Shapes) -> UnetShape:
    """Reads the U-Net's architecture from a single file's shapes.

    Args:
        shapes: of the whole file, names as in the file.
    Raises: UserError: the names are not those of a U-Net of this family, or it is an inpainting model.
    """
    try:
        return _unet_shape({key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)})
    except (KeyError, IndexError) as error:
        raise UserError(f"the U-Net lacks the tensor {UNET}{error.args[0]}") from None


def _unet_shape(shapes: Shapes) -> UnetShape:
    levels: list[list[int]] = [[]]  # the numbers of each level's resnets
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{number}.0.out_layers.3.weight" in shapes:
            levels[-1].append(number)
        else:
            break
        number += 1
    counts = {len(level) for level in levels}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            f"the U-Net's levels have {[len(level) for level in levels]} layers; equal numbers are expected"
        )
    in_channels = shapes["input_blocks.0.0.weight"][1]
    if in_channels == 9:
        raise UserError("this is an inpainting model (9 input channels); training those is not available yet")
    middle = "middle_block.1."
    return UnetShape(
        widths=tuple(shapes[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in levels),
        layers=counts.pop(),
        attention=tuple(f"input_blocks.{level[0]}.1.proj_in.weight" in shapes for level in levels),
        # diffusers gives the middle the depth of the last level, which in the real models has no transformers.
        depths=tuple(_depth(shapes, f"input_blocks.{level[0]}.1.") or _depth(shapes, middle) for level in levels),
        context=shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        in_channels=in_channels,
        out_channels=shapes["out.2.weight"][0],
        linear_projection=len(shapes[f"{middle}proj_in.weight"]) == 2,
    )


def _depth(shapes: Shapes, prefix: str) -> int:
    depth = 0
    while f"{prefix}transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def vae_shapes(shapes: Shapes) -> Shapes:
    """The VAE's part of a file's shapes, without prefix; a stand-alone file may have none to take off."""
    inside = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    return inside or shapes


def has_text_model_level(keys: Iterable[str]) -> bool:
    """Whether an SD 1.x file writes `text_model.` in its text encoder's names; some leave it out."""
    return any(key.startswith(f"{CLIP}text_model.") for key in keys)


def text_keys(keys: Iterable[str], v2: bool) -> list[str]:
    """The text encoder's keys that are used.

    SD 2.x files hold one layer more than is run (the penultimate one is the output), a projection and a scale; both
    layouts may hold position numbers.
    """
    prefix = OPEN_CLIP if v2 else CLIP
    inside = [key for key in keys if key.startswith(prefix) and not key.endswith("position_ids")]
    if not v2:
        return inside
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    numbers = {key: int(match[1]) for key in inside if (match := layer.match(key))}
    last = max(numbers.values(), default=0)
    outside = {prefix + name for name in ("text_projection", "text_projection.weight", "logit_scale", "attn_mask")}
    return [key for key in inside if key not in outside and numbers.get(key, -1) != last]
