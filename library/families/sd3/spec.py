"""Stable Diffusion 3 and 3.5, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.sd3.options import TRAITS, Sd3ControlNetFamily, Sd3Options
from library.families.spec import FamilySpec, ModelKind
from library.options.control_net import ONE_RATE_CONTROL_NET_GROUPS
from library.options.embedding import T5_EMBEDDING_GROUPS
from library.options.finetune import THREE_ENCODER_GROUPS
from library.options.large_models import BlockSwapOptions, LargeModelOptions, TextCacheOptions

SD3 = ModelKind("a Stable Diffusion 3 model", keys=r"joint_blocks\.\d+\.", pipeline="StableDiffusion3")

SPEC = FamilySpec(
    name="sd3",
    traits=TRAITS,
    options=Sd3Options,
    scripts={
        "sd3_train_network": "network",
        "sd3_train": "finetune",
        "sd3_train_textual_inversion": "embedding",
        "sd3_train_control_net": "control_net",
    },
    groups={
        "network": (LargeModelOptions, TextCacheOptions, BlockSwapOptions),
        "finetune": THREE_ENCODER_GROUPS,
        "embedding": T5_EMBEDDING_GROUPS,
        "control_net": (Sd3ControlNetFamily, *ONE_RATE_CONTROL_NET_GROUPS),
    },
    kinds=(SD3,),
    network_layers=r"_unet_joint_blocks_\d",
    adapter=EntryPoint("library.families.sd3.adapter:Sd3Family"),
    check_paths=EntryPoint("library.families.sd3.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.sd3.variants:check_text_paths"),
    missing_encoders=EntryPoint("library.families.sd3.variants:missing_encoders"),
    load_vae=EntryPoint("library.families.sd3.loading:load_vae_alone"),
)
