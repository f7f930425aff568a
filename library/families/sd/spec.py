"""Stable Diffusion 1.x and 2.x, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.sd.options import TRAITS, SdOptions
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
        "train_control_net": "control_net",
        "train_controlnet": "control_net",
    },
    kinds=(SD1, SD2),
    adapter=EntryPoint("library.families.sd.adapter:SdFamily"),
    check_paths=EntryPoint("library.families.sd.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.sd.variants:check_paths"),
    complete_options=EntryPoint("library.families.shared.markers:follow"),
    load_vae=EntryPoint("library.families.sd.loading:load_vae_alone"),
)
