"""What kohya_ss writes into its configuration file with nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

COMMON: dict[str, Any] = {  # every family
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "caption_extension": ".txt",
    "clip_skip": 1,
    "dynamo_backend": "no",
    "enable_bucket": True,
    "epoch": 1,
    "gradient_accumulation_steps": 1,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "learning_rate": 0.0001,
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": [],
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "lr_warmup_steps": 0.1,
    "max_bucket_reso": 2048,
    "max_data_loader_n_workers": 0,
    "max_grad_norm": 1.0,
    "max_timestep": 1000,
    "max_token_length": 75,
    "max_train_epochs": 8,
    "max_train_steps": 1600,
    "min_bucket_reso": 256,
    "multires_noise_discount": 0,
    "noise_offset_type": "Original",
    "optimizer_args": [],
    "optimizer_type": "AdamW",
    "output_name": "x",
    "persistent_data_loader_workers": 0,
    "prior_loss_weight": 1.0,
    "resolution": "512,512",
    "sample_prompts": "no/such/prompt.txt",
    "sample_sampler": "euler_a",
    "save_every_n_epochs": 1,
    "save_model_as": "safetensors",
    "save_precision": "fp16",
    "train_batch_size": 1,
    "wandb_run_name": "x",
    "xformers": True,
}
LORA_TAB = {"network_alpha": 1, "network_args": [], "network_dim": 8, "unet_lr": 0.0001}
TABS: dict[tuple[str, str], dict[str, Any]] = {  # family, method -> what its tab writes besides
    ("sd", "network"): {**LORA_TAB, "network_module": "networks.lora", "text_encoder_lr": [0.0001, 0.0001]},
    ("sdxl", "network"): {**LORA_TAB, "network_module": "networks.lora", "text_encoder_lr": [0.0001, 0.0001]},
    ("sd3", "network"): {
        **LORA_TAB,
        "network_module": "networks.lora_sd3",
        "text_encoder_lr": [0.0001, 0.0001, 0.0001],
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "weighting_scheme": "logit_normal",
        "t5xxl_dtype": "bf16",
        "text_encoder_batch_size": 1,
    },
    ("flux", "network"): {
        **LORA_TAB,
        "network_module": "networks.lora_flux",
        "text_encoder_lr": [0.0001, 0.0001],
        "double_blocks_to_swap": 0,
        "single_blocks_to_swap": 0,
        "model_prediction_type": "raw",
        "discrete_flow_shift": 3.0,
        "timestep_sampling": "sigma",
        "text_encoder_batch_size": 1,
    },
    ("sd", "dreambooth"): {"learning_rate_te": 0.0001},
    ("sdxl", "finetune"): {"learning_rate_te1": 0.0001, "learning_rate_te2": 0.0001, "train_text_encoder": True},
    ("sd3", "finetune"): {"learning_rate_te": 0.0001, "t5xxl_dtype": "bf16"},
    ("flux", "finetune"): {
        "learning_rate_te": 0.0001,
        "train_text_encoder": True,
        "blocks_to_swap": 0,
        "model_prediction_type": "raw",
        "timestep_sampling": "sigma",
        "discrete_flow_shift": 3.0,
    },
}


def written_by_gui(family: str, method: str) -> dict[str, Any]:
    """The keys of one tab, without the paths that its user fills in."""
    return {**COMMON, **TABS[family, method]}


def write_gui_file(path: Path, keys: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(keys), encoding="utf-8")
    return path
