"""Layers as LyCORIS chooses them: by presets, which name classes and paths of the original model. No torch here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.runtime.documents import read_toml
from networks.arguments import Reader, from_file_warnings
from networks.selection import Choice, Selection, TargetLayer

TRANSFORMERS = ("Transformer2DModel", "DoubleStreamBlock", "SingleStreamBlock", "SingleDiTBlock")
RESNETS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
ENDS = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
CLIP = ("CLIPAttention", "CLIPMLP")


@dataclass(frozen=True)
class Preset:
    """Which modules of a model are adapted: by the class of a module that contains them, or by path.

    Paths are regular expressions that must be found at the beginning of a path, or patterns of file names where
    `use_fnmatch` is set. The maps give arguments to the layers of a class, or of a path.
    """

    enable_conv: bool = True
    unet_target_module: Sequence[str] = ()
    unet_target_name: Sequence[str] = ()
    text_encoder_target_module: Sequence[str] = ()
    text_encoder_target_name: Sequence[str] = ()
    exclude_name: Sequence[str] = ()
    module_algo_map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name_algo_map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use_fnmatch: bool = False

    def fits(self, patterns: Sequence[str], path: str) -> bool:
        """Whether a path is one of `patterns`, or matches one."""
        return path in patterns or any(self._match(pattern, path) for pattern in patterns)

    def _match(self, pattern: str, path: str) -> bool:
        return fnmatch.fnmatch(path, pattern) if self.use_fnmatch else bool(re.match(pattern, path))

    def overrides(self, layer: TargetLayer) -> Mapping[str, Any] | None:
        """The layer's own arguments; None: it is not adapted."""
        text = layer.target.part != "denoiser"
        modules = self.text_encoder_target_module if text else self.unet_target_module
        names = self.text_encoder_target_name if text else self.unet_target_name
        paths = [path for path, _ in layer.classes]
        if any(self.fits(self.exclude_name, path) for path in [*paths, layer.path]):
            return None
        if self.fits(names, layer.path) or any(layer.path.endswith(f".{name}") for name in names):
            own = (given for name, given in self.name_algo_map.items() if self._names(name, layer.path))
            return next(own, {})
        found = [name for _, name in layer.classes if name in modules]
        if not found:
            return None
        inner = [name for _, name in layer.classes if name in self.module_algo_map]
        return self.module_algo_map[inner[-1]] if inner else {}

    def _names(self, name: str, path: str) -> bool:
        return name == path or path.endswith(f".{name}") or self._match(name, path)


PRESETS = {
    "full": Preset(True, (*TRANSFORMERS, *RESNETS), ENDS, CLIP),
    "full-lin": Preset(False, (*TRANSFORMERS, "ResnetBlock2D"), ENDS[2:], CLIP),
    "attn-mlp": Preset(False, TRANSFORMERS, (), CLIP),
    "attn-only": Preset(False, ("CrossAttention", "SelfAttention"), (), ("CLIPAttention",)),
    "unet-only": Preset(True, (*TRANSFORMERS, *RESNETS), ENDS),
    "unet-transformer-only": Preset(False, TRANSFORMERS),
    "unet-convblock-only": Preset(True, RESNETS, ENDS[:2]),
    "ia3": Preset(
        False,
        unet_target_name=("to_k", "to_v", "ff.net.2"),
        text_encoder_target_name=("k_proj", "v_proj", "mlp.fc2"),
        name_algo_map={"mlp.fc2": {"train_on_input": True}, "ff.net.2": {"train_on_input": True}},
    ),
}


@dataclass(frozen=True)
class PresetSelection(Selection):
    """The layers of a preset; norms inside its modules with `train_norm`, T5's with `train_t5xxl`."""

    # bypass_mode is another way to compute the same.
    NAMES = ("algo", "preset", "conv_dim", "conv_alpha", "train_norm", "train_t5xxl", "bypass_mode")

    preset: Preset = PRESETS["full"]
    conv_dim: int | None = None
    conv_alpha: float | None = None
    train_norm: bool = False
    train_t5xxl: bool = False

    @classmethod
    def read(cls, reader: Reader) -> PresetSelection:
        return cls(
            preset=_preset(reader),
            conv_dim=reader.number("conv_dim", int, least=0),
            conv_alpha=reader.number("conv_alpha", float, least=0),
            train_norm=reader.flag("train_norm"),
            train_t5xxl=reader.flag("train_t5xxl"),
        )

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        return from_file_warnings(given) if ranks_from_file else []

    def choose(self, layer: TargetLayer, dim: int, alpha: float | None) -> Choice | None:
        """See `Selection`. Larger convolutions have the common rank and alpha where they are given none."""
        target = layer.target
        if target.from_file:
            return None
        t5 = target.optional and target.part != "denoiser" and not target.norm
        if t5 and not self.train_t5xxl:
            return None
        given = {} if t5 else self.preset.overrides(layer)
        if given is None or (target.norm and not self.train_norm):
            return None
        own = {name: str(value) for name, value in given.items() if name not in ("dim", "alpha")}
        if target.norm:
            return Choice(1, None, {**own, "algo": "norm"})
        rank, strength = given.get("dim", dim), given.get("alpha", alpha)
        if layer.kernel:
            rank = given.get("dim", dim if self.conv_dim is None else self.conv_dim)
            rank = rank if self.preset.enable_conv else given.get("dim", 0)
            strength = given.get("alpha", alpha if self.conv_alpha is None else self.conv_alpha)
        return Choice(rank, strength, own) if rank else None


def _preset(reader: Reader) -> Preset:
    name = reader.args.get("preset", "").strip() or "full"
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml"):
        reader.refuse("preset", f"is none of {', '.join(PRESETS)}, and no .toml file")
        return PRESETS["full"]
    try:
        given = read_toml(Path(name), "preset")
    except UserError as error:
        reader.problems += [f"--network_args: preset: {problem}" for problem in error.problems]
        return PRESETS["full"]
    known = {entry.name for entry in fields(Preset)}
    for key in given.keys() - known:
        reader.refuse("preset", f"{key} is unknown; a preset has {', '.join(sorted(known))}")
    return Preset(**{key: value for key, value in given.items() if key in known})
