"""FLUX.1, as a family."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.flux.options import TRAITS, FluxControlNetFamily, FluxOptions
from library.families.flux.tools import FluxExtractOptions, FluxMergeOptions
from library.families.spec import FamilySpec, ModelKind
from library.options.control_net import FUSED_CONTROL_NET_GROUPS
from library.options.embedding import T5_EMBEDDING_GROUPS
from library.options.finetune import DENOISER_ONLY_GROUPS
from library.options.large_models import LargeModelOptions, ModulationOptions, SplitModeOptions, TextCacheOptions
from library.options.leco import SPLIT_LECO_GROUPS

FLUX = ModelKind(
    "a FLUX model",
    keys=r"double_blocks\.\d+\.|^transformer_blocks\.\d+\.attn\.add_k_proj",
    pipeline="Flux",
    unsupported=(  # other models with FLUX's block names, and weights that cannot be read
        (r"distilled_guidance_layer\.", "this is a Chroma model; a FLUX.1 model is needed here"),
        (r"double_stream_modulation_img\.", "this is a FLUX.2 model; a FLUX.1 model is needed here"),
        (
            r"\.(quant_state\.|absmax$|quant_map$)",
            "its weights are quantised to 4 bits, which cannot be trained on; use the file in 16 bits or fp8",
        ),
    ),
)
IN_CHANNELS = 64  # 16 of the latents, in patches of 2 x 2
FOLDERS = {"te1": "text_encoder", "te3": "text_encoder_2"}  # of a Diffusers model

SPEC = FamilySpec(
    name="flux",
    traits=TRAITS,
    options=FluxOptions,
    scripts={
        "flux_train_network": "network",
        "flux_train": "finetune",
        "flux_train_textual_inversion": "embedding",
        "flux_train_control_net": "control_net",
        "flux_train_leco": "leco",
    },
    groups={
        "network": (LargeModelOptions, TextCacheOptions, SplitModeOptions, ModulationOptions),
        "finetune": DENOISER_ONLY_GROUPS,
        "embedding": T5_EMBEDDING_GROUPS,
        "control_net": (FluxControlNetFamily, *FUSED_CONTROL_NET_GROUPS),
        "leco": SPLIT_LECO_GROUPS,
    },
    tools={"flux_merge_lora": FluxMergeOptions, "flux_extract_lora": FluxExtractOptions},
    kinds=(FLUX,),
    network_layers=r"_unet_(double_blocks|single_blocks|single_transformer_blocks)_\d",
    input_layers={"lora_unet_img_in": IN_CHANNELS, "lora_unet_x_embedder": IN_CHANNELS},
    folders={**FOLDERS, "denoiser": "transformer"},
    adapter=EntryPoint("library.families.flux.adapter:FluxFamily"),
    check_paths=EntryPoint("library.families.flux.variants:check_paths"),
    check_text_paths=EntryPoint("library.families.flux.variants:check_text_paths"),
    layer_names=EntryPoint("library.families.flux.layer_names:layer_names"),
    file_model=EntryPoint("library.families.flux.file_model:file_model"),
    load_vae=EntryPoint("library.families.flux.loading:load_vae_alone"),
)
