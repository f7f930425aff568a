"""Reads Stable Diffusion 1.x/2.x models: single files, Diffusers folders and hub ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.keymap import KeyMap
from library.checkpoints.reading import SafetensorsFile, TorchFile, open_weights, read_header
from library.errors import UserError
from library.families.sd.keymap import UNET, VAE, text_map, unet_map, vae_map
from library.families.sd.variants import (
    SD1,
    SD2,
    VAE_ONLY,
    folder_problem,
    has_text_model_level,
    is_hub_id,
    mismatch,
    recognise,
    text_keys,
    unet_shape,
    vae_shapes,
)
from library.families.shared.building import build, freeze
from library.families.shared.clip import build_clip, clip_config
from library.families.shared.vae import vae_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Form = tuple[torch.dtype, tuple[int, ...]]

SCALING_FACTOR = 0.18215
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class Source:
    """Where a model came from, and what saving it in the same form needs to know."""

    name: str  # path or hub id
    vae_name: str  # where the VAE came from
    v2: bool
    is_file: bool
    text_model_level: bool = True  # of an SD 1.x file's names
    forms: dict[str, Form] = field(default_factory=dict)  # dtype and shape that each used key of the file had
    preserved: tuple[str, ...] = ()  # keys of the file that the model does not use
    part_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of a Diffusers folder: unet, vae, text_encoder
    counters: dict[str, int] = field(default_factory=dict)  # epoch and global_step of a .ckpt

    @property
    def save_as(self) -> str:
        """The output format that is the same kind as the source."""
        if not self.is_file:
            return "diffusers_safetensors" if self.part_dtypes else "diffusers"
        return "safetensors" if self.name.lower().endswith(".safetensors") else "ckpt"


@dataclass
class Parts:
    denoiser: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    source: Source


def load_model(name: str, v2: bool, vae_name: str | None = None) -> Parts:
    """Loads a whole model on the CPU, in float32, frozen.

    Args:
        name: a single file, a Diffusers folder or a hub id.
        v2: whether it must be a 2.x model (else it must be 1.x).
        vae_name: where to take the VAE from instead; see `load_vae`.
    Raises: UserError: missing, unreadable, incomplete or of another family.
    """
    parts = _load_file(Path(name), v2) if Path(name).is_file() else _load_folder(name, v2)
    if vae_name:
        parts.vae, forms = load_vae(vae_name)
        old = {key: form for key, form in parts.source.forms.items() if not key.startswith(VAE)}
        dtypes = {part: dtype for part, dtype in parts.source.part_dtypes.items() if part != "vae"}
        parts.source = replace(parts.source, vae_name=vae_name, forms=old | forms, part_dtypes=dtypes)
    return parts


def load_vae(name: str) -> tuple[nn.Module, dict[str, Form]]:
    """Loads a VAE, and the dtypes and shapes of its tensors by their single-file names (empty for folders).

    Args:
        name: a Stable Diffusion file, a VAE file (latent-diffusion or Diffusers names), a Diffusers model folder, a
            VAE folder, or a hub id of one of these.
    Raises: UserError: missing, unreadable, or without a VAE.
    """
    path = Path(name)
    if path.is_file():
        with naming(path):
            weights = open_weights(path)
            kind = recognise(weights)
            if kind not in (SD1, SD2, VAE_ONLY):
                raise UserError(f"this is {kind}; a VAE or a Stable Diffusion model is needed here")
            return _vae_from_file(weights)
    from diffusers import AutoencoderKL

    if path.is_dir():
        return from_pretrained(AutoencoderKL, name, "vae" if (path / "vae").is_dir() else None), {}
    try:
        return from_pretrained(AutoencoderKL, name, "vae"), {}
    except UserError:
        return from_pretrained(AutoencoderKL, name, None), {}


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Puts the file's name before the messages of mistakes found inside it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(*(f"{path}: {problem}" for problem in error.problems), hint=error.hint) from None


# --- single files -----------------------------------------------------------------------------------------------------


class _Reader:
    """Takes tensors out of a file as float32 and notes their forms."""

    def __init__(self, weights: SafetensorsFile | TorchFile):
        self.weights = weights
        self.forms: dict[str, Form] = {}

    def take(self, keys: list[str]) -> dict[str, Tensor]:
        import torch

        taken = {}
        for key in keys:
            tensor = self.weights[key]
            self.forms[key] = (tensor.dtype, tuple(tensor.shape))
            taken[key] = tensor.to(torch.get_default_device(), torch.float32)
        return taken


def _load_file(path: Path, v2: bool) -> Parts:
    with naming(path):
        weights = open_weights(path)
        problem = mismatch(recognise(weights), v2)
        if problem:
            raise UserError(problem)
        reader = _Reader(weights)
        level = v2 or has_text_model_level(weights)
        denoiser = _unet_from_file(reader, v2)
        text_encoder = _text_encoder_from_file(reader, v2, level)
        vae, vae_forms = _vae_from_file(weights)
    forms = reader.forms | vae_forms
    source = Source(
        name=str(path),
        vae_name=str(path),
        v2=v2,
        is_file=True,
        text_model_level=level,
        forms=forms,
        preserved=tuple(key for key in weights if key not in forms),
        counters={k: v for k, v in getattr(weights, "extra", {}).items() if k in ("epoch", "global_step")},
    )
    return Parts(denoiser, text_encoder, vae, source)


def _unet_from_file(reader: _Reader, v2: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    shape = unet_shape(reader.weights.shapes)
    keys = unet_map(len(shape.widths), shape.layers, shape.attention)
    tensors = keys.to_model(reader.take([key for key in reader.weights if key.startswith(UNET)]))
    return build(lambda: UNet2DConditionModel(**shape.diffusers_config(v2)), tensors, "the U-Net")


def _text_encoder_from_file(reader: _Reader, v2: bool, text_model_level: bool) -> nn.Module:
    keys = text_map(v2, text_model_level)
    tensors = keys.to_model(reader.take(text_keys(reader.weights, v2)))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = clip_config(shapes, hidden_act="gelu" if v2 else "quick_gelu", pad_id=0 if v2 else 49407)
    return build_clip(tensors, config, "the text encoder")


def _vae_from_file(weights: SafetensorsFile | TorchFile) -> tuple[nn.Module, dict[str, Form]]:
    from diffusers import AutoencoderKL

    prefix = VAE if any(key.startswith(VAE) for key in weights) else ""
    reader = _Reader(weights)
    used = [key for key in weights if key.startswith(tuple(prefix + part for part in VAE_PARTS))]
    tensors = {key.removeprefix(prefix): tensor for key, tensor in reader.take(used).items()}
    forms = {VAE + key.removeprefix(prefix): form for key, form in reader.forms.items()}
    if any(key.startswith("encoder.down_blocks.") for key in tensors):
        dtype = next(iter(forms.values()))[0]
        tensors = _to_ldm_names(tensors)
        forms = {VAE + key: (dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    config = vae_config(vae_shapes({key: tuple(t.shape) for key, t in tensors.items()}), SCALING_FACTOR)
    keys = vae_map(len(config["block_out_channels"]), prefix="")
    return build(lambda: AutoencoderKL(**config), keys.to_model(tensors), "the VAE"), forms


def _to_ldm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE file with Diffusers' names, new or old, under latent-diffusion names."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for key, tensor in tensors.items():
        for was, now in old.items():
            key = key.replace(was, now)
        renamed[key] = tensor
    levels = 1 + max(int(key.split(".")[2]) for key in renamed if key.startswith("encoder.down_blocks."))
    keys: KeyMap = vae_map(levels, prefix="")
    return keys.to_file(renamed)


# --- Diffusers folders and the hub ------------------------------------------------------------------------------------


def _load_folder(name: str, v2: bool) -> Parts:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"{name}: no such file or folder (and not a hub id of the form owner/model)")
    with naming(name):
        if Path(name).is_dir():
            problem = folder_problem(Path(name), v2)
            if problem:
                raise UserError(problem)
        text_encoder = from_pretrained(CLIPTextModel, name, "text_encoder")
        problem = mismatch(SD2 if text_encoder.config.hidden_act == "gelu" else SD1, v2)
        if problem:
            raise UserError(problem)
        denoiser = from_pretrained(UNet2DConditionModel, name, "unet")
        vae = from_pretrained(AutoencoderKL, name, "vae")
    dtypes = {part: dtype for part in ("unet", "text_encoder", "vae") if (dtype := _folder_dtype(Path(name) / part))}
    return Parts(denoiser, text_encoder, vae, Source(name, name, v2, is_file=False, part_dtypes=dtypes))


def from_pretrained(model_class: Any, name: str, subfolder: str | None) -> nn.Module:
    """Loads one part of a Diffusers folder or of a hub model in float32; the hub's cache is asked before the hub.

    Raises: UserError: it is in none of these, or cannot be read.
    """
    import torch

    dtype_word = "dtype" if model_class.__module__.startswith("transformers") else "torch_dtype"
    options: dict[str, Any] = {dtype_word: torch.float32} | ({"subfolder": subfolder} if subfolder else {})
    error: Exception | None = None
    for local in (True,) if Path(name).is_dir() else (True, False):
        for variant in (None, "fp16"):  # some models come in half precision only
            try:
                model = model_class.from_pretrained(name, local_files_only=local, variant=variant, **options)
                return freeze(model)
            except (OSError, ValueError, RuntimeError) as problem:
                error = error if variant and error else problem
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    where = f"{name}/{subfolder}" if subfolder else name
    if Path(name).is_dir():
        raise UserError(f"{where}: cannot be loaded ({reason})")
    raise UserError(
        f"{where}: neither a file or folder here, nor in the hub's cache, and the hub did not give it ({reason})"
    )


def _folder_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of a part's safetensors file, or None where there is none to ask."""
    import torch

    words = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    for path in sorted(folder.glob("*.safetensors")):
        for dtype, _ in read_header(path)[1].values():
            if dtype in words:
                return words[dtype]
    return None
