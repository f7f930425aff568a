"""Models as they were published, as files without data: their names, dtypes and shapes, and a hole for the weights.

    python benchmarks/header_models.py FOLDER

A plan reads nothing else. The files take no room on most disks; FOLDER/flux.safetensors looks 24 GB large.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from architectures import FLUX_DEV, SD15, SD35_LARGE, SD35_MEDIUM, SDXL, Model
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.checkpoints.writing import without_data, write_safetensors
from library.families.flux.keymap import flux_map
from library.families.sd import loading as sd_loading
from library.families.sd import saving as sd_saving
from library.families.sd3.keymap import mmdit_map
from library.families.sdxl import loading as sdxl_loading
from library.families.sdxl import saving as sdxl_saving
from library.families.shared.clip import public_state
from library.families.shared.t5 import t5_state
from library.families.shared.vae import vae_map
from library.types import Models


def clip(width: int, layers: int, *, act: str = "quick_gelu", projected: int | None = None) -> nn.Module:
    """A CLIP text encoder with heads 64 wide."""
    kind = CLIPTextModel if projected is None else CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projected or width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        eos_token_id=49407,
    )
    return kind(config)


def vae(channels: int = 4) -> AutoencoderKL:
    quant = channels == 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


@contextmanager
def _shapes() -> Iterator[None]:
    with torch.device("meta"), without_data():
        yield


def write_sd15(path: Path, **changes: object) -> None:
    """One file in float16. `changes` are of the U-Net's configuration."""
    with _shapes():
        unet, text = UNet2DConditionModel(**{**SD15.config, **changes}), clip(768, 12)
        source = sd_loading.Source(name="", vae_name="", is_file=False)
        models = Models(unet, {"te": text}, {}, vae(), source)
        sd_saving.save_model(models, path, save_as="safetensors", dtype=torch.float16, metadata={})


def write_sdxl(path: Path) -> None:
    """One file in float16."""
    with _shapes():
        texts = {"te1": clip(768, 12), "te2": clip(1280, 32, act="gelu", projected=1280)}
        source = sdxl_loading.Source(name="", vae_name="", is_file=False)
        models = Models(UNet2DConditionModel(**SDXL.config), texts, {}, vae(), source)
        sdxl_saving.save_model(models, path, save_as="safetensors", dtype=torch.float16, metadata={})


def _write_encoders(folder: Path) -> None:
    """T5 XXL in bfloat16 and CLIP-L in float16, as `t5xxl.safetensors` and `clip_l.safetensors`."""
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    ).to(torch.bfloat16)  # fmt: skip
    clip_l = {**public_state(clip(768, 12).half()), "text_projection.weight": torch.empty(768, 768).half()}
    write_safetensors(folder / "t5xxl.safetensors", t5_state(t5))
    write_safetensors(folder / "clip_l.safetensors", clip_l)


def _named(folder: Path, **names: str) -> dict[str, str]:
    return {option: str(folder / f"{name}.safetensors") for option, name in names.items()}


def write_flux(folder: Path) -> dict[str, str]:
    """FLUX.1 dev in bfloat16, with its parts in separate files. Returns: the options that name them."""
    with _shapes():
        denoiser = FluxTransformer2DModel(**FLUX_DEV.config).to(torch.bfloat16)
        _write_encoders(folder)
        write_safetensors(folder / "flux.safetensors", flux_map().to_file(denoiser.state_dict()))
        write_safetensors(folder / "ae.safetensors", vae_map(4, prefix="").to_file(vae(16).state_dict()))
    return _named(folder, pretrained_model_name_or_path="flux", clip_l="clip_l", t5xxl="t5xxl", ae="ae")


def write_sd3(folder: Path, name: str, model: Model) -> dict[str, str]:
    """Stable Diffusion 3.5 in float16, its text encoders in separate files. Returns: the options that name them."""
    with _shapes():
        denoiser = SD3Transformer2DModel(**model.config).half()
        _write_encoders(folder)
        clip_g = clip(1280, 32, act="gelu", projected=1280).half()
        write_safetensors(folder / "clip_g.safetensors", public_state(clip_g))
        tensors = mmdit_map(model.config["num_layers"]).to_file(denoiser.state_dict())
        tensors |= vae_map(4).to_file(vae(16).half().state_dict())
        write_safetensors(folder / f"{name}.safetensors", tensors)
    return _named(folder, pretrained_model_name_or_path=name, clip_l="clip_l", clip_g="clip_g", t5xxl="t5xxl")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_sd15(folder / "sd15.safetensors")
    write_sdxl(folder / "sdxl.safetensors")
    write_flux(folder)
    write_sd3(folder, "sd35m", SD35_MEDIUM)
    write_sd3(folder, "sd35l", SD35_LARGE)


if __name__ == "__main__":
    main()
