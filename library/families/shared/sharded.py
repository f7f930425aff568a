"""Weights of one model that lie in several files, and the weights of a part of a Diffusers folder, read as one file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.keymap import first_few
from library.errors import UserError
from library.families.shared.reading import open_model
from library.families.shared.recognition import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.shared.reading import Weights

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)")
_INDEX = ".index.json"
_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files in Diffusers folders
_ENDINGS = (".safetensors", ".bin")


def open_sharded(path: Path, *, mapped: bool = True) -> Weights | Shards:
    """Opens a weight file; with it, where its name is one of `<name>-00001-of-00003.safetensors`, all the others.

    Args:
        path: a weight file, the first shard, or the folder of one part of a Diffusers model.
        mapped: as of `open_model`.
    Raises: UserError: missing, incomplete, broken, or no weights.
    """
    files = _weight_files(path) if path.is_dir() else _shards(path)
    return open_model(files[0], mapped=mapped) if len(files) == 1 else Shards(files, mapped=mapped)


class Shards(Mapping[str, "Tensor"]):
    """The tensors of several open files; see `SafetensorsFile`.

    Raises: UserError: two files have a tensor of the same name.
    """

    def __init__(self, paths: list[Path], *, mapped: bool = True):
        self.path = paths[0]
        self._files: dict[str, Weights] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            weights = open_model(path, mapped=mapped)
            twice = sorted(self._files.keys() & weights.shapes.keys())
            if twice:
                raise UserError(f"{path}: has tensors that another file of the same model has: {first_few(twice)}")
            self._files |= dict.fromkeys(weights, weights)
            self.shapes |= weights.shapes

    def __getitem__(self, key: str) -> Tensor:
        return self._files[key][key]

    def dtype(self, key: str) -> torch.dtype:
        return self._files[key].dtype(key)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(path: Path) -> list[Path]:
    """All files that a file's name counts; the file alone where it counts none."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05}-of-{match['count']}{match['ending']}" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{path.parent}: {len(missing)} of the {count} files of the model are missing: {first_few(missing)}"
        )
    return [path.parent / name for name in names]


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a part's folder: .safetensors before .bin, whole weights before variants such as fp16."""
    for ending in _ENDINGS:
        for name in _NAMES:
            whole, index = folder / f"{name}{ending}", folder / f"{name}{ending}{_INDEX}"
            if whole.is_file():
                return [whole]
            if index.is_file():
                return _indexed(index)
            variants = sorted(path for path in folder.glob(f"{name}.*{ending}") if not _SHARD.fullmatch(path.name))
            variants += sorted(folder.glob(f"{name}{ending}.*{_INDEX}"))
            if variants:
                return _indexed(variants[0]) if variants[0].name.endswith(_INDEX) else variants[:1]
    raise UserError(f"{folder}: holds no weights ({', '.join(_NAMES)}, {' or '.join(_ENDINGS)})")


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map; get the file again")
    files = sorted({index.parent / Path(name).name for name in names.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {len(missing)} of the {len(files)} files of the model are missing: {first_few(missing)}"
        )
    return files
