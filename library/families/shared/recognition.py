"""What a weight file or a model folder is, by names alone: no torch, so that mistakes are found at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import read_names
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.vae import NO_VAE
from library.families.spec import ModelKind
from library.runtime import files
from library.runtime.documents import parse_json, read_text

if TYPE_CHECKING:
    from library.options.base import Options

VAE_ONLY = ModelKind(
    "a VAE", keys=r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|mid_block)"
)
CONTROLNET = ModelKind("a ControlNet", keys=r"^control_model\.|^input_hint_block\.|^controlnet_")
LLLITE = ModelKind("a ControlNet-LLLite", keys=r"^lllite_")
UNKNOWN = ModelKind("not a model that is known here", keys=r"(?!)")
NETWORK = ModelKind(
    "a LoRA (or similar network) file",
    keys=r"^lora_|\.lora_(down|up|A|B)\.|\.hada_w1_a$|\.lokr_w1|\.oft_(blocks|diag)$",
)
# The first kind whose pattern is found in any key names the file.
_NO_MODELS = (
    NETWORK,
    ModelKind("a Textual Inversion embedding", keys=r"^emb_params$|^clip_[lg]$|^string_to_param"),
    LLLITE,
    CONTROLNET,
)
_PARTS = (
    ModelKind("a U-Net without a text encoder", keys=r"^model\.diffusion_model\.|^input_blocks\."),
    ModelKind("a Diffusers U-Net by itself", keys=r"^(unet\.)?(down_blocks|up_blocks)\."),
    VAE_ONLY,
    ModelKind("a text encoder by itself", keys=r"^(text_model\.)?encoder\.layers?\."),
    ModelKind("a T5 text encoder", keys=r"^encoder\.block\.\d+\."),
)
FAMILY_OF = {kind: spec.name for spec in FAMILIES.values() for kind in spec.kinds}


def recognise(keys: Iterable[str]) -> ModelKind:
    """The kind of a weight file, from its key names; UNKNOWN where they fit nothing."""
    text = "\n".join(keys)
    kinds = (*_NO_MODELS, *FAMILY_OF, *_PARTS)
    return next((kind for kind in kinds if re.search(kind.keys, text, re.MULTILINE)), UNKNOWN)


def unsupported(keys: Iterable[str], kind: ModelKind) -> str | None:
    """Why a file of this kind cannot be used, by names that only other models and formats have; None: it can."""
    text = "\n".join(keys)
    return next((problem for pattern, problem in kind.unsupported if re.search(pattern, text, re.MULTILINE)), None)


def recognise_file(path: Path) -> ModelKind | None:
    """`recognise` for a file; None where only loading shows it. Raises: UserError: broken, or no weight file."""
    names = read_names(path)
    return None if names is None else recognise(names)


def file_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a file's tensors; None where only loading shows them. Raises: UserError: as `recognise_file`."""
    names = read_names(path)
    return None if names is None else {key: shape for key, (_, shape) in names.items()}


def pipeline_kind(folder: Path) -> ModelKind | None:
    """The kind that the model_index.json of a Diffusers folder names; None where it names none that is known here.

    Raises: UserError: the file is broken.
    """
    index = folder / "model_index.json"
    return pipeline_named(str(read_json(index).get("_class_name")) if index.is_file() else "")


def pipeline_named(name: str) -> ModelKind | None:
    """The kind whose pipelines diffusers calls so; None where it is none that is known here."""
    return next((kind for kind in FAMILY_OF if kind.pipeline and name.startswith(kind.pipeline)), None)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file or folder here could be a model on the hub: `owner/model`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not re.search(
        r"\.(safetensors|ckpt|pth?|bin)$", name, re.IGNORECASE
    )


def path_problem(flag: str, name: str, problem_of: Callable[[Path], str | None]) -> str | None:
    """The problem with the path or hub id that `flag` names, or None.

    Args:
        problem_of: what is wrong with a file or folder that exists; may raise UserError.
    """
    path = Path(name)
    if not os.path.exists(name):  # unlike Path.exists, it raises nothing over names that are too long
        if is_hub_id(name):
            return None
        why = files.path_problem(name, "file")
        if why != "no such file":
            return f"{flag}: {name}: {why}"
        return f"{flag}: {name}: no such file or folder (and not a hub id of the form owner/model)"
    try:
        problem = problem_of(path)
    except UserError as error:
        return f"{flag}: {error}"
    except OSError as error:
        return f"{flag}: {error.filename or name}: {files.reason(error)}"
    return problem and f"{flag}: {name}: {problem}"


def missing_vae_folder(folder: Path) -> str | None:
    """What is wrong with a Diffusers model's folder that brings no VAE of its own; None when it has one."""
    return None if (folder / "vae").is_dir() else NO_VAE


def vae_problem(path: Path, kinds: tuple[ModelKind, ...]) -> str | None:
    """Why a file or folder cannot give a VAE; None when it can.

    Args:
        kinds: what a file may be besides a VAE by itself.
    """
    if path.is_dir():
        is_vae = (path / "vae" / "config.json").is_file() or (path / "config.json").is_file()
        return None if is_vae else "holds neither vae/config.json nor a VAE's config.json"
    kind = recognise_file(path)
    return None if kind is None else vae_kind_problem(kind, kinds)


def vae_kind_problem(kind: ModelKind, kinds: tuple[ModelKind, ...]) -> str | None:
    """Why a file of this kind cannot give a VAE; see `vae_problem`."""
    if kind in (*kinds, VAE_ONLY):
        return None
    return f"this is {kind}; a VAE, or {' or '.join(map(str, kinds))}, is needed here"


def controlnet_problem(opts: Options, class_name: str) -> str | None:
    """What is wrong with the ControlNet that the options name, as far as names show; None where they name none.

    Args: class_name: what diffusers calls the family's ControlNets.
    """
    name, problem_of = opts.method.controlnet_model_name_or_path, partial(no_controlnet, class_name=class_name)
    return path_problem("--controlnet_model_name_or_path", name, problem_of) if name else None


def no_controlnet(path: Path, class_name: str | None = None) -> str | None:
    """Why a file or folder cannot give a ControlNet; None when it can.

    Args: class_name: of what a Diffusers folder must hold; None: of any family.
    """
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            return "not the Diffusers folder of a ControlNet: config.json is missing"
        name = str(read_json(config).get("_class_name"))
        if name == class_name or (class_name is None and name.endswith("ControlNetModel")):
            return None
        return f"this is a {name}; a {class_name or 'ControlNetModel'} is needed here"
    kind = recognise_file(path)
    return None if kind in (None, CONTROLNET) else f"this is {kind}; a ControlNet is needed here"


def no_lllite(path: Path) -> str | None:
    """Why a file cannot give a ControlNet-LLLite; None when it can."""
    if path.is_dir():
        return "this is a folder; the file of a ControlNet-LLLite is needed here"
    kind = recognise_file(path)
    return None if kind in (None, LLLITE) else f"this is {kind}; a ControlNet-LLLite is needed here"


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file of a Diffusers folder. Raises: UserError: missing or broken."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: missing from the Diffusers folder")
    value = parse_json(read_text(path, "the file"), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return value
