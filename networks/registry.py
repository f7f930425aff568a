"""The types of adapter layers. A new one is a module in `networks.types`, its `NetworkType` and a line in TYPES here.

No torch here. `networks.<name>` are the values of --network_module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from library.entry_points import EntryPoint
from networks.layer_args import ChangeArgs, DyLoraArgs, LohaArgs, LokrArgs, LoraArgs, PerturbedLoraArgs, SplitLoraArgs
from networks.spec import NetworkType

LORA = NetworkType(
    label="LoRA",
    tensors=r"lora_down\.weight lora_up\.weight",
    args=LoraArgs,
    layer=EntryPoint("networks.types.lora:LoraLayer"),
)
# Trained otherwise; their files are those of LoRA.
LORA_FA = replace(LORA, layer=EntryPoint("networks.types.lora_fa:LoraFaLayer"))
DYLORA = replace(LORA, args=DyLoraArgs, layer=EntryPoint("networks.types.dylora:DyLoraLayer"))
SPLIT_LORA = replace(
    LORA,
    args=SplitLoraArgs,
    layer=EntryPoint("networks.types.lora_split:DitLoraLayer"),
    correct=EntryPoint("networks.types.lora_split:with_trained_scales"),
)
PERTURBED_LORA = replace(SPLIT_LORA, args=PerturbedLoraArgs)

_DORA = r"(dora_scale )?"
LOCON = NetworkType(
    label="LoCon",
    tensors=_DORA + r"lora_down\.weight (lora_mid\.weight )?lora_up\.weight",
    args=ChangeArgs,
    layer=EntryPoint("networks.types.locon:LoconLayer"),
)
LOHA = NetworkType(
    label="LoHa",
    tensors=_DORA + r"(hada_t1 hada_t2 )?hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
    args=LohaArgs,
    layer=EntryPoint("networks.types.loha:LohaLayer"),
)
LOKR = NetworkType(
    label="LoKr",
    tensors=_DORA + r"(lokr_t2 )?lokr_w1(_a lokr_w1_b)? lokr_w2(_a lokr_w2_b)?",
    args=LokrArgs,
    layer=EntryPoint("networks.types.lokr:LokrLayer"),
)

TYPES = (LORA, LOCON, LOHA, LOKR)  # one for each layout that layers have in files


def type_of(names: Iterable[str]) -> NetworkType | None:
    """The type of a layer with these tensors in a file; None: of none that is known here."""
    names = frozenset(names)
    return next((kind for kind in TYPES if kind.reads(names)), None)
