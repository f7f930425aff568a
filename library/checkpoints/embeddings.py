"""Files of Textual Inversion embeddings: the vectors of one word for each text encoder.

Written as {key: (n, width)}, with one key per text encoder (`FamilyTraits.embedding_keys`). Read are also
AUTOMATIC1111's {"string_to_param": {"*": (n, width)}} and diffusers' {"<word>": (n, width) or (width,)}.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import SafetensorsFile, file_format, read_header, read_torch
from library.checkpoints.writing import materialise, write_safetensors, write_torch
from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Other names of the same vectors, in files of diffusers' training scripts.
_ALIASES = {"clip_l": ("text_encoders_0",), "clip_g": ("text_encoders_1",), "t5xxl": ("t5",)}
_A1111 = "string_to_param"
BUNDLED = "bundle_emb."  # in a network's file before "<word>.<name of vectors>"
_SHOWN = 4  # names that a message lists


def read_embedding(path: str | Path) -> dict[str, Tensor]:
    """The vectors of a file by their names there, each (n, width) float32 on the CPU.

    Raises: UserError: missing, damaged, no embedding, or its text encoders have different numbers of vectors.
    """
    path = Path(path)
    found = {name: _vectors(value, name, path) for name, value in _tensors(path).items()}
    if not found:
        raise UserError(f"{path}: holds no embedding")
    if len({len(vectors) for vectors in found.values()}) > 1:
        counts = ", ".join(f"{name} {len(vectors)}" for name, vectors in list(found.items())[:_SHOWN])
        raise UserError(f"{path}: not one embedding, as the numbers of vectors differ: {counts}")
    return found


def has_bundled(path: str | Path) -> bool:
    """Whether a network's file holds embeddings; of a .safetensors its header says so."""
    names = read_header(path)[1] if file_format(path) == "safetensors" else read_torch(path)
    return any(str(name).startswith(BUNDLED) for name in names)


def read_bundled(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The embeddings in a network's file, by word: vectors by their names, each (n, width) float32 on the CPU.

    Raises: UserError: missing or damaged.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in _tensors(Path(path)).items():
        word, _, key = name.removeprefix(BUNDLED).partition(".")
        if name.startswith(BUNDLED):
            found.setdefault(word, {})[key] = _vectors(value, name, Path(path))
    return found


def names_by_part(names: Collection[str], keys: Mapping[str, str], path: str | Path) -> dict[str, str]:
    """Which name of a file belongs to which text encoder; at least one does.

    Args:
        names: of the file's tensors.
        keys: by text encoder, the name that its vectors have in files.
    Raises: UserError: none fits.
    """
    found = {}
    for part, key in keys.items():
        name = next((name for name in (key, *_ALIASES.get(key, ())) if name in names), None)
        if name is not None:
            found[part] = name
    if not found and len(keys) == 1 and len(names) == 1:  # named by its word
        found = dict(zip(keys, names, strict=True))
    if not found:
        shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise UserError(
            f"{path}: no embedding for this kind of model: holds {shown}; {' or '.join(keys.values())} is needed"
        )
    return found


def write_embedding(
    path: Path, vectors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Writes vectors, each (n, width), by the names they have in files. Only .safetensors files have metadata.

    Args: dtype: of the file; None: as they are.
    """
    tensors = {key: materialise(value.detach().to(dtype or value.dtype)).clone() for key, value in vectors.items()}
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata)
    else:
        write_torch(path, tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    import torch

    if file_format(path) == "safetensors":
        return dict(SafetensorsFile(path))
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get(_A1111), dict):
        content = dict(list(content[_A1111].items())[:1])
    pairs = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _vectors(value: Any, name: str, path: Path) -> Tensor:
    vectors = value[None] if value.ndim == 1 else value
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors):
        shape = "x".join(map(str, value.shape))
        raise UserError(f"{path}: not an embedding: {name} has the shape {shape or 'of a number'}, not vectors x width")
    return vectors.detach().float().clone()
