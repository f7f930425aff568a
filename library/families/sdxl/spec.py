"""SDXL, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.sdxl.options import TRAITS, SdxlOptions
from library.families.sdxl.tools import SdxlMergeOptions
from library.families.spec import FamilySpec, ModelKind
from library.options.control_net import LARGE_CONTROL_NET_GROUPS, ONE_RATE_CONTROL_NET_GROUPS
from library.options.embedding import TWO_ENCODER_EMBEDDING_GROUPS
from library.options.finetune import TWO_ENCODER_GROUPS
from library.options.large_models import BlockSwapOptions, LargeModelOptions, TextCacheOptions
from library.options.leco import LARGE_LECO_GROUPS

SDXL = ModelKind("an SDXL model", keys=r"^conditioner\.embedders\.", pipeline="StableDiffusionXL")
FOLDERS = {"te1": "text_encoder", "te2": "text_encoder_2"}  # of a Diffusers model

SPEC = FamilySpec(
    name="sdxl",
    traits=TRAITS,
    options=SdxlOptions,
    scripts={
        "sdxl_train_network": "network",
        "sdxl_train": "finetune",
        "sdxl_train_textual_inversion": "embedding",
        "sdxl_train_control_net": "control_net",
        "sdxl_train_control_net_lllite": "lllite",
        "sdxl_train_leco": "leco",
    },
    groups={
        "network": (LargeModelOptions, TextCacheOptions, BlockSwapOptions),
        "finetune": TWO_ENCODER_GROUPS,
        "embedding": TWO_ENCODER_EMBEDDING_GROUPS,
        "control_net": LARGE_CONTROL_NET_GROUPS,
        "lllite": ONE_RATE_CONTROL_NET_GROUPS,
        "leco": LARGE_LECO_GROUPS,
    },
    tools={"sdxl_merge_lora": SdxlMergeOptions},
    kinds=(SDXL,),
    network_layers=r"_unet_((\w+_attentions|input_blocks_\d|output_blocks_\d|middle_block)_\d_transformer_blocks_[1-9])",
    folders={**FOLDERS, "denoiser": "unet"},
    adapter=EntryPoint("library.families.sdxl.adapter:SdxlFamily"),
    check_paths=EntryPoint("library.families.sdxl.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.sdxl.variants:check_text_paths"),
    complete_options=EntryPoint("library.families.shared.markers:follow"),
    layer_names=EntryPoint("library.families.sdxl.layer_names:layer_names"),
    file_model=EntryPoint("library.families.sdxl.file_model:file_model"),
    load_vae=EntryPoint("library.families.sdxl.loading:load_vae_alone"),
)
