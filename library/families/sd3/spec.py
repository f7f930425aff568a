"""Stable Diffusion 3 and 3.5, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.sd3.options import TRAITS, Sd3ControlNetFamily, Sd3Options
from library.families.sd3.tools import Sd3ExtractOptions, Sd3MergeOptions
from library.families.spec import FamilySpec, ModelKind
from library.options.control_net import ONE_RATE_CONTROL_NET_GROUPS
from library.options.embedding import T5_EMBEDDING_GROUPS
from library.options.finetune import THREE_ENCODER_GROUPS
from library.options.large_models import BlockSwapOptions, LargeModelOptions, ModulationOptions, TextCacheOptions
from library.options.leco import LARGE_LECO_GROUPS

SD3 = ModelKind("a Stable Diffusion 3 model", keys=r"joint_blocks\.\d+\.", pipeline="StableDiffusion3")
FOLDERS = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}  # of a Diffusers model

SPEC = FamilySpec(
    name="sd3",
    traits=TRAITS,
    options=Sd3Options,
    scripts={
        "sd3_train_network": "network",
        "sd3_train": "finetune",
        "sd3_train_textual_inversion": "embedding",
        "sd3_train_control_net": "control_net",
        "sd3_train_leco": "leco",
    },
    groups={
        "network": (LargeModelOptions, TextCacheOptions, BlockSwapOptions, ModulationOptions),
        "finetune": THREE_ENCODER_GROUPS,
        "embedding": T5_EMBEDDING_GROUPS,
        "control_net": (Sd3ControlNetFamily, *ONE_RATE_CONTROL_NET_GROUPS),
        "leco": LARGE_LECO_GROUPS,
    },
    tools={"sd3_merge_lora": Sd3MergeOptions, "sd3_extract_lora": Sd3ExtractOptions},
    kinds=(SD3,),
    network_layers=r"_unet_joint_blocks_\d",
    folders={**FOLDERS, "denoiser": "transformer"},
    adapter=EntryPoint("library.families.sd3.adapter:Sd3Family"),
    check_paths=EntryPoint("library.families.sd3.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.sd3.variants:check_text_paths"),
    missing_encoders=EntryPoint("library.families.sd3.variants:missing_encoders"),
    layer_names=EntryPoint("library.families.sd3.layer_names:layer_names"),
    file_model=EntryPoint("library.families.sd3.file_model:file_model"),
    load_vae=EntryPoint("library.families.sd3.loading:load_vae_alone"),
)
