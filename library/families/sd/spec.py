"""Stable Diffusion 1.x and 2.x, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.sd.options import TRAITS, SdOptions
from library.families.sd.tools import InterrogateOptions, SdExtractOptions, SdMergeOptions
from library.families.spec import FamilySpec, ModelKind

SD1 = ModelKind("a Stable Diffusion 1.x model", keys=r"^cond_stage_model\.transformer\.")
SD2 = ModelKind("a Stable Diffusion 2.x model", keys=r"^cond_stage_model\.model\.", options={"v2": True})

SPEC = FamilySpec(
    name="sd",
    traits=TRAITS,
    options=SdOptions,
    scripts={
        "train_network": "network",
        "train_db": "dreambooth",
        "fine_tune": "finetune",
        "train_textual_inversion": "embedding",
        "train_textual_inversion_XTI": "xti",
        "train_control_net": "control_net",
        "train_controlnet": "control_net",
        "train_leco": "leco",
    },
    tools={
        "merge_lora": SdMergeOptions,
        "extract_lora_from_models": SdExtractOptions,
        "lora_interrogator": InterrogateOptions,
    },
    kinds=(SD1, SD2),
    # It has transformers at its finest level, and one block in each of them.
    network_layers=r"_unet_(down_blocks_0_att|up_blocks_3_att|input_blocks_[12]_1_|output_blocks_(9|10|11)_1_)",
    folders={"te": "text_encoder", "denoiser": "unet"},
    adapter=EntryPoint("library.families.sd.adapter:SdFamily"),
    check_paths=EntryPoint("library.families.sd.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.sd.variants:check_paths"),
    complete_options=EntryPoint("library.families.shared.markers:follow"),
    layer_names=EntryPoint("library.families.sd.layer_names:layer_names"),
    file_model=EntryPoint("library.families.sd.file_model:file_model"),
    load_vae=EntryPoint("library.families.sd.loading:load_vae_alone"),
)
