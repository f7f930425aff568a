"""The types of adapter layers. A new one is a module in `networks.layers`, its `NetworkType` and a line in TYPES here.

No torch here. `networks.<name>` are the values of --network_module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from library.entry_points import EntryPoint
from networks.layer_args import (
    DyLoraArgs,
    InputBoftArgs,
    InputOftArgs,
    KohyaOftArgs,
    LohaArgs,
    LokrArgs,
    LoraArgs,
    LyLoconArgs,
    LyLokrArgs,
    NumberedOftArgs,
    OftArgs,
    PerturbedLoraArgs,
    SplitLoraArgs,
    WholeArgs,
)
from networks.spec import NetworkType

LORA = NetworkType(
    label="LoRA",
    tensors=r"lora_down\.weight lora_up\.weight",
    args=LoraArgs,
    layer=EntryPoint("networks.layers.lora:LoraLayer"),
)
# Trained otherwise; their files are those of LoRA.
LORA_FA = replace(LORA, layer=EntryPoint("networks.layers.lora_fa:LoraFaLayer"))
DYLORA = replace(LORA, args=DyLoraArgs, layer=EntryPoint("networks.layers.dylora:DyLoraLayer"))
SPLIT_LORA = replace(
    LORA,
    args=SplitLoraArgs,
    layer=EntryPoint("networks.layers.lora_split:DitLoraLayer"),
    correct=EntryPoint("networks.layers.lora_split:with_trained_scales"),
)
PERTURBED_LORA = replace(SPLIT_LORA, args=PerturbedLoraArgs)

_DORA, _BIAS = r"(dora_scale )?", r"(diff_b )?"
LOCON = NetworkType(
    label="LoCon",
    tensors=_BIAS + _DORA + r"lora_down\.weight (lora_mid\.weight )?lora_up\.weight",
    args=LyLoconArgs,
    layer=EntryPoint("networks.layers.locon:LoconLayer"),
)
LOHA = NetworkType(
    label="LoHa",
    tensors=_DORA + r"(hada_t1 hada_t2 )?hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
    args=LohaArgs,
    layer=EntryPoint("networks.layers.loha:LohaLayer"),
)
LOKR = NetworkType(
    label="LoKr",
    tensors=_DORA + r"(lokr_t2 )?lokr_w1(_a lokr_w1_b)? lokr_w2(_a lokr_w2_b)?",
    args=LokrArgs,
    layer=EntryPoint("networks.layers.lokr:LokrLayer"),
)

LOHA_FULL = replace(LOHA, args=LyLoconArgs)  # with every argument of LyCORIS
LOKR_FULL = replace(LOKR, args=LyLokrArgs)
FULL = NetworkType(
    label="full weight differences",
    tensors=r"diff( diff_b)?|diff_b",
    args=WholeArgs,
    layer=EntryPoint("networks.layers.full:FullLayer"),
)
NORM = NetworkType(
    label="trained norms",
    tensors=r"(b_norm )?w_norm|b_norm",
    args=WholeArgs,
    layer=EntryPoint("networks.layers.full:NormLayer"),
)
SET = NetworkType(
    label="replaced norms",
    tensors=r"set_weight",
    args=WholeArgs,
    layer=EntryPoint("networks.layers.full:ReplacedNormLayer"),
)
# Modules of a fused layer one by one, each of any type; see `networks.fused.stacked`.
STACK = NetworkType(
    label="parts of fused layers",
    tensors=r"\d+/\S+( \d+/\S+)*",
    args=LyLokrArgs,
    layer=EntryPoint("networks.layers.stacked:StackedLayer"),
)
IA3 = NetworkType(
    label="(IA)^3",
    tensors=r"on_input weight",
    args=WholeArgs,
    layer=EntryPoint("networks.layers.scaled:Ia3Layer"),
)
GLORA = NetworkType(
    label="GLoRA",
    tensors=r"a1\.weight a2\.weight b1\.weight b2\.weight",
    args=LyLoconArgs,
    layer=EntryPoint("networks.layers.scaled:GloraLayer"),
)
OFT = NetworkType(
    label="OFT",
    tensors=r"(oft_blocks|oft_blocks\.0( oft_blocks\.\d+)*)( rescale)?",
    args=OftArgs,
    layer=EntryPoint("networks.layers.oft:OftLayer"),
)
BOFT = replace(OFT, label="BOFT", layer=EntryPoint("networks.layers.oft:BoftLayer"))
# Of sd-scripts: other arguments, and other prefixes of layers' names.
KOHYA_OFT = replace(OFT, args=KohyaOftArgs, prefix="oft")
NUMBERED_OFT = replace(OFT, args=NumberedOftArgs, prefix="oft")
# Rotations of inputs, as PEFT has them; `networks.layouts` says when the name is PEFT's own.
INPUT_OFT = NetworkType(
    label="OFTv2",
    tensors=r"(oft|peft)_R\.weight",
    args=InputOftArgs,
    layer=EntryPoint("networks.layers.input_rotations:InputOftLayer"),
)
INPUT_BOFT = NetworkType(
    label="BOFT of inputs",
    tensors=r"boft_R boft_s",
    args=InputBoftArgs,
    layer=EntryPoint("networks.layers.input_rotations:InputBoftLayer"),
)

TYPES = (
    LORA,
    LOCON,
    LOHA,
    LOKR,
    FULL,
    NORM,
    SET,
    IA3,
    GLORA,
    OFT,
    INPUT_OFT,
    INPUT_BOFT,
    STACK,
)  # one for each layout of layers in files


def type_of(names: Iterable[str]) -> NetworkType | None:
    """The type of a layer with these tensors in a file; None: of none that is known here."""
    names = frozenset(names)
    return next((kind for kind in TYPES if kind.reads(names)), None)
