"""Arguments of the types of adapter layers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from networks.arguments import ArgumentGroup, Reader


@dataclass(frozen=True)
class LayerArgs(ArgumentGroup):
    """What a type of layer is made with, beside its rank and alpha."""

    def reads_gradients(self) -> str | None:
        """The argument that needs the gradients when the backward pass is over, where there is one."""
        return None


@dataclass(frozen=True)
class LoraArgs(LayerArgs):
    """Dropouts in [0, 1]: of ``down(x)``, of ranks, and of whole layers."""

    NAMES = ("dropout", "rank_dropout", "module_dropout")

    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None

    @classmethod
    def read(cls, reader: Reader) -> LoraArgs:
        return cls(**_dropouts(reader))


def _dropouts(reader: Reader) -> dict[str, float | None]:
    return {
        "dropout": reader.number("dropout", float, least=0, most=1),
        "rank_dropout": reader.number("rank_dropout", float, least=0, below=1),
        "module_dropout": reader.number("module_dropout", float, least=0, most=1),
    }


@dataclass(frozen=True)
class SplitLoraArgs(LoraArgs):
    """`split_qkv`: whether layers that are fused in files are trained in parts."""

    NAMES = (*LoraArgs.NAMES, "split_qkv")

    split_qkv: bool = False

    @classmethod
    def read(cls, reader: Reader) -> SplitLoraArgs:
        return cls(split_qkv=reader.flag("split_qkv"), **_dropouts(reader))


GGPO = ("ggpo_sigma", "ggpo_beta")


@dataclass(frozen=True)
class PerturbedLoraArgs(SplitLoraArgs):
    """Strengths of the perturbation in training (LoRA-GGPO): both are given, or none."""

    NAMES = (*SplitLoraArgs.NAMES, *GGPO)

    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None

    @classmethod
    def read(cls, reader: Reader) -> PerturbedLoraArgs:
        ggpo: dict[str, Any] = {name: reader.number(name, float, least=0) for name in GGPO}
        if len(ggpo.keys() & reader.args.keys()) == 1:
            given = next(name for name in GGPO if name in reader.args)
            reader.refuse(given, f"needs the other one too: {GGPO[0]} and {GGPO[1]}")
        return cls(split_qkv=reader.flag("split_qkv"), **_dropouts(reader), **ggpo)

    def reads_gradients(self) -> str | None:
        return None if self.ggpo_sigma is None else GGPO[0]


@dataclass(frozen=True)
class DyLoraArgs(LayerArgs):
    """`unit`: ranks that are trained together."""

    NAMES = ("unit",)

    unit: int = 1

    @classmethod
    def read(cls, reader: Reader) -> DyLoraArgs:
        return cls(unit=reader.number("unit", int, least=1) or 1)
