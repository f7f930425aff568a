"""Taking models out of weight files, Diffusers folders and the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.checkpoints.reading import (
    SafetensorsFile,
    TorchFile,
    file_format,
    open_weights,
    read_header,
    read_layout,
    reads_shapes_only,
)
from library.checkpoints.scaled import is_scale, multiplied, scale_of
from library.errors import UserError
from library.families.shared import hub
from library.families.shared.building import build, freeze, meta_model
from library.families.shared.recognition import is_hub_id, missing_vae_folder, recognise, vae_kind_problem
from library.families.shared.vae import (
    NO_VAE,
    VAE,
    VAE_PARTS,
    file_entries,
    has_diffusers_names,
    missing_vae,
    vae_config,
    vae_map,
    vae_shapes,
)
from library.runtime.files import open_regular

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from library.families.spec import ModelKind

    Weights = SafetensorsFile | TorchFile
    TensorSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor in a file

S = TypeVar("S", bound="Source")


@dataclass(frozen=True)
class Source:
    """The origin of a model, with what is needed to save it in the same form."""

    name: str  # path or hub id
    vae_name: str  # where the VAE came from
    is_file: bool
    tensor_specs: dict[str, TensorSpec] = field(
        default_factory=dict
    )  # dtype and shape that each used key of the file had
    preserved: tuple[str, ...] = ()  # keys of the file that the model does not use
    part_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of a Diffusers folder, by subfolder
    counters: dict[str, int] = field(default_factory=dict)  # epoch and global_step of a .ckpt
    file_kind: str = "safetensors"  # of a file, "safetensors" or "ckpt"

    @property
    def save_as(self) -> str:
        """The output format that is the same kind as the source."""
        if not self.is_file:
            return "diffusers_safetensors" if self.part_dtypes else "diffusers"
        return self.file_kind

    def with_vae(self: S, name: str, tensor_specs: Mapping[str, TensorSpec]) -> S:
        """This source with the VAE from another place."""
        others = {key: form for key, form in self.tensor_specs.items() if not key.startswith(VAE)}
        dtypes = {part: dtype for part, dtype in self.part_dtypes.items() if part != "vae"}
        return replace(self, vae_name=name, tensor_specs=others | dict(tensor_specs), part_dtypes=dtypes)


@contextmanager
def error_prefix(path: Path | str) -> Iterator[None]:
    """Puts the file's name before the messages of mistakes found inside it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(*(f"{path}: {problem}" for problem in error.problems), hint=error.hint) from None


class Reader:
    """Takes tensors out of a file, onto torch's default device, and notes their tensor_specs.

    Weights that have a scale of their own come multiplied by it; the scales, as part of their form, do not come.

    Args:
        dtype: what tensors become; None keeps each one's own, but for 8 bit floats, in which nothing can be computed:
            they become bfloat16.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype | None):
        self.weights = weights
        self.dtype = dtype
        self.tensor_specs: dict[str, TensorSpec] = {}

    def take(self, keys: Iterable[str]) -> dict[str, Tensor]:
        import torch

        taken = {}
        for key in keys:
            tensor = self.weights[key]
            self.tensor_specs[key] = (tensor.dtype, tuple(tensor.shape))
            if is_scale(key):
                continue
            is_fp8 = tensor.is_floating_point() and tensor.dtype.itemsize == 1
            dtype = self.dtype or (torch.bfloat16 if is_fp8 else tensor.dtype)
            device, scale = torch.get_default_device(), scale_of(key, self.weights)
            if scale is not None:
                self.tensor_specs[key] = (
                    torch.bfloat16,
                    tuple(tensor.shape),
                )  # no 8 bits without scales hold the product
                tensor = multiplied(key, tensor.to(device), self.weights[scale])
            taken[key] = tensor.to(device, dtype)
        return taken


def open_model(path: Path, *, mapped: bool = True) -> Weights:
    """`open_weights`; with `mapped` False a .safetensors file is read by ordinary reads instead of being mapped."""
    return open_weights(path) if mapped or file_format(path) != "safetensors" else PlainFile(path)


class PlainFile(SafetensorsFile):
    """A .safetensors file without a memory map, which network drives and WSL read slowly."""

    def __init__(self, path: Path):
        self.path = path
        parsed, start = read_layout(path)
        self.metadata = parsed.metadata
        self.shapes = {key: tensor.shape for key, tensor in parsed.tensors.items()}
        self._words = {key: tensor.dtype for key, tensor in parsed.tensors.items()}
        self._starts = {key: start + tensor.start for key, tensor in parsed.tensors.items()}

    def _read(self, key: str) -> Tensor:
        import torch

        tensor = torch.empty(self.shapes[key], dtype=self.dtype(key), device="cpu")
        with open_regular(self.path) as file:
            file.seek(self._starts[key])
            if tensor.numel():
                file.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return tensor


def file_kind(weights: Weights) -> str:
    """The `save_as` of an open file: "safetensors" or "ckpt"."""
    return "safetensors" if isinstance(weights, SafetensorsFile) else "ckpt"


def counters(weights: Weights) -> dict[str, int]:
    """The training counters of a .ckpt: epoch and global_step, as far as it has them."""
    return {name: value for name, value in getattr(weights, "extra", {}).items() if name in ("epoch", "global_step")}


def require_model_name(name: str) -> None:
    """Raises: UserError: neither a file or folder nor anything that could be a hub id."""
    if not os.path.exists(name) and not is_hub_id(name):
        raise UserError(f"{name}: no such file or folder (and not a hub id of the form owner/model)")


def from_pretrained(
    model_class: Any,
    name: str,
    subfolder: str | None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **options: Any,
) -> nn.Module:
    """Loads one part of a Diffusers folder or of a hub model; the hub's cache is asked before the hub.

    Args:
        dtype: of its weights; None means float32.
        variant: of the weight files, such as fp16; None: whole weights, or fp16 where there are no others.
        options: further ones of `model_class.from_pretrained`.
    Raises: UserError: it is in none of these, or cannot be read.
    """
    import torch

    dtype_word = "dtype" if model_class.__module__.startswith("transformers") else "torch_dtype"
    options |= {dtype_word: dtype or torch.float32} | ({"subfolder": subfolder} if subfolder else {})
    device = torch.get_default_device()
    if device != torch.device("cpu"):
        options["device_map"] = {"": device}  # tensor by tensor, never as a whole in CPU memory
    error: Exception | None = None
    why: str | None = None
    for local in (True,) if Path(name).is_dir() else (True, False):
        why = None if local else hub.no_answer(name)
        if why:
            break
        for tried in (variant,) if variant else (None, "fp16"):  # some models come in half precision only
            try:
                if reads_shapes_only():
                    return _without_values(model_class, name, local, options)
                model = model_class.from_pretrained(name, local_files_only=local, variant=tried, **options)
                return freeze(model)
            except (OSError, ValueError, RuntimeError) as problem:
                error = error if tried and error else problem
    reason = why or (str(error).splitlines() or [type(error).__name__])[0]
    where = f"{name}/{subfolder}" if subfolder else name
    if Path(name).is_dir():
        raise UserError(f"{where}: cannot be loaded ({reason})")
    raise UserError(
        f"{where}: neither a local file or folder, nor in the hub's cache, and the hub does not provide it ({reason})"
    )


def _without_values(model_class: Any, name: str, local: bool, options: dict[str, Any]) -> nn.Module:
    """The model of a folder's configuration, whose weights have no values."""
    where = {"local_files_only": local, "subfolder": options.get("subfolder") or ""}
    if hasattr(model_class, "config_class") and model_class.config_class is not None:  # transformers
        others = {word: options[word] for word in options.keys() - {"subfolder", "dtype", "device_map"}}
        config = model_class.config_class.from_pretrained(name, **where, **others)
        model, dtype = meta_model(lambda: model_class(config)), options["dtype"]
    else:
        config = model_class.load_config(name, **where)
        model, dtype = meta_model(lambda: model_class.from_config(config)), options["torch_dtype"]
    return freeze(model.to(dtype).to_empty(device="cpu"))


def meta_model_of_folder(model_class: type[ModelMixin], folder: str, subfolder: str) -> nn.Module:
    """`meta_model` of one of diffusers' models in a Diffusers folder. Raises: UserError: it cannot be read."""
    try:
        config = model_class.load_config(folder, subfolder=subfolder, local_files_only=True)
        return meta_model(lambda: model_class.from_config(config))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}/{subfolder}: cannot be loaded ({reason})") from None


def folder_dtype(folder: Path, variant: str | None = None) -> torch.dtype | None:
    """The dtype of a part's safetensors file, or None where there is none to ask.

    Args: variant: as of `from_pretrained`.
    """
    import torch

    words = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    # Variants have another dot in their names.
    for path in sorted(folder.glob(f"*{ending}"), key=lambda path: (path.name.count("."), path.name)):
        for dtype, _ in read_header(path)[1].values():
            if dtype in words:
                return words[dtype]
    return None


def folder_dtypes(folder: Path, parts: Iterable[str], variant: str | None = None) -> dict[str, torch.dtype]:
    """`folder_dtype` by subfolder, of those that have one."""
    return {part: dtype for part in parts if (dtype := folder_dtype(folder / part, variant)) is not None}


# --- VAEs -------------------------------------------------------------------------------------------------------------


def vae_origin(given: str | None, model: str | None, flag: str = "--vae") -> str:
    """The origin of a VAE that is loaded alone: the file that `flag` names, or the model.

    Raises: UserError: neither is named.
    """
    origin = given or model
    if not origin:
        raise UserError(f"--pretrained_model_name_or_path: name a model, or its VAE alone with {flag}")
    return origin


def vae_of_model_file(weights: Weights, scaling_factor: float) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """`vae_from_file` of a whole model's file. Raises: UserError: it brings no VAE, or a broken one."""
    problem = missing_vae(weights)
    if problem:
        raise UserError(problem)
    return vae_from_file(weights, scaling_factor)


def vae_of_model_folder(name: str, variant: str | None = None) -> nn.Module:
    """The VAE of a Diffusers model's folder or hub id. Raises: UserError: it brings none, or it cannot be read.

    Args: variant: as of `from_pretrained`.
    """
    from diffusers import AutoencoderKL

    problem = missing_vae_folder(Path(name)) if Path(name).is_dir() else None
    if problem:
        raise UserError(problem)
    return from_pretrained(AutoencoderKL, name, "vae", variant=variant)


def load_vae(
    name: str,
    *,
    kinds: tuple[ModelKind, ...],
    channels: int,
    scaling_factor: float,
    shift_factor: float | None = None,
) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """Loads a VAE in float32, and the dtypes and shapes of its tensors by their single-file names (none for folders).

    Args:
        name: a model's file, a VAE file (latent-diffusion or Diffusers names), a Diffusers model folder, a VAE folder,
            or a hub id of one of these.
        kinds: what a file may be besides a VAE by itself, see `recognition`.
        channels: of the latents.
        scaling_factor, shift_factor: for a file, which does not hold them.
    Raises: UserError: missing, unreadable, or without such a VAE.
    """
    from diffusers import AutoencoderKL

    path, tensor_specs = Path(name), {}
    if path.is_file():
        with error_prefix(path):
            weights = open_weights(path)
            problem = vae_kind_problem(recognise(weights), kinds)
            if problem:
                raise UserError(problem)
            vae, tensor_specs = vae_from_file(weights, scaling_factor, shift_factor)
    elif path.is_dir():
        vae = from_pretrained(AutoencoderKL, name, "vae" if (path / "vae").is_dir() else None)
    else:
        try:
            vae = from_pretrained(AutoencoderKL, name, "vae")
        except UserError:
            vae = from_pretrained(AutoencoderKL, name, None)
    if vae.config.latent_channels != channels:
        raise UserError(f"{name}: this VAE's latents have {vae.config.latent_channels} channels; {channels} are needed")
    return vae, tensor_specs


def vae_from_file(
    weights: Weights, scaling_factor: float, shift_factor: float | None = None
) -> tuple[nn.Module, dict[str, TensorSpec]]:
    """The VAE of an open file, in float32, and the `TensorSpec`s of its tensors by their names in a whole model's file.

    Raises: UserError: there is none, or it lacks tensors.
    """
    import torch
    from diffusers import AutoencoderKL

    prefix = VAE if any(key.startswith(VAE) for key in weights) else ""
    reader = Reader(weights, torch.float32)
    used = [key for key in weights if key.startswith(tuple(prefix + part for part in VAE_PARTS))]
    if not used:
        raise UserError(NO_VAE)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in reader.take(used).items()}
    tensor_specs = {VAE + key.removeprefix(prefix): form for key, form in reader.tensor_specs.items()}
    if has_diffusers_names(tensors):
        dtype = next(iter(tensor_specs.values()))[0]
        entries = file_entries(tensors)
        tensors = {e.file.removeprefix(VAE): e.rule.join([tensors[name] for name in e.models]) for e in entries}
        tensor_specs = {VAE + key: (dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    shapes = vae_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    config = vae_config(shapes, scaling_factor, shift_factor)
    keys = vae_map(len(config["block_out_channels"]), prefix="")
    return build(lambda: AutoencoderKL(**config), keys.to_model(tensors), "the VAE"), tensor_specs
