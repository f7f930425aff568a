"""Tiny FLUX.1 models with random weights, in the layout of published files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.shared.vae import vae_map
from library.options.base import Options
from tests.builders.options import options_for
from tests.builders.t5 import t5_weights, tiny_t5, write_t5_tokenizer

HEAD, HEADS = 32, 2  # the narrowest head whose rotary axes are all even
WIDTH = HEAD * HEADS
CLIP, T5 = 64, 48  # widths of what the text encoders give
IN_CHANNELS = 64
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159


def flux_tensors(
    variant: str = "dev",
    *,
    double: int = 2,
    single: int = 2,
    width: int = WIDTH,
    head: int = HEAD,
    seed: int = 0,
    blank: bool = False,
) -> dict[str, Tensor]:
    """The transformer under the names of its authors' code, without prefix. `blank`: zeros in bfloat16, made fast."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        if blank:
            return torch.zeros(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)

    def linear(name: str, inside: int, outside: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(outside, inside), draw(outside)

    def norms(name: str) -> None:
        tensors[f"{name}.query_norm.scale"], tensors[f"{name}.key_norm.scale"] = 1 + draw(head), 1 + draw(head)

    linear("img_in", IN_CHANNELS, width)
    for name, inside in (("time_in", 256), ("vector_in", CLIP), ("guidance_in", 256)):
        if name != "guidance_in" or variant == "dev":
            linear(f"{name}.in_layer", inside, width)
            linear(f"{name}.out_layer", width, width)
    linear("txt_in", T5, width)
    for number in range(double):
        for stream in ("img", "txt"):
            place = f"double_blocks.{number}.{stream}"
            linear(f"{place}_mod.lin", width, 6 * width)
            linear(f"{place}_attn.qkv", width, 3 * width)
            norms(f"{place}_attn.norm")
            linear(f"{place}_attn.proj", width, width)
            linear(f"{place}_mlp.0", width, 4 * width)
            linear(f"{place}_mlp.2", 4 * width, width)
    for number in range(single):
        place = f"single_blocks.{number}"
        linear(f"{place}.linear1", width, 7 * width)
        linear(f"{place}.linear2", 5 * width, width)
        norms(f"{place}.norm")
        linear(f"{place}.modulation.lin", width, 3 * width)
    linear("final_layer.linear", width, IN_CHANNELS)
    linear("final_layer.adaLN_modulation.1", width, 2 * width)
    return tensors


def tiny_clip_l(seed: int = 1) -> CLIPTextModel:
    """CLIP-L with the whole vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=CLIP,
            intermediate_size=96,
            projection_dim=CLIP,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
        model = CLIPTextModel(config)
        _shake(model)
    return model.requires_grad_(False).eval()


def clip_l_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """A CLIP text encoder under the names of published files, which hold a projection too."""
    names = {name.removeprefix("text_model."): tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {f"text_model.{name}": tensor for name, tensor in names.items() if not name.endswith("position_ids")}
    return {**tensors, "text_projection.weight": torch.eye(CLIP), "logit_scale": torch.tensor(4.6)}


def tiny_ae(seed: int = 2) -> AutoencoderKL:
    """16 channels of latents, no quant_conv, as the published autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=SCALING_FACTOR,
            shift_factor=SHIFT_FACTOR,
        )
        _shake(vae)
    return vae.requires_grad_(False).eval()


def ae_tensors() -> dict[str, Tensor]:
    """The autoencoder under the names of the published ae.safetensors."""
    return {name: tensor.clone() for name, tensor in vae_map(4, prefix="").to_file(tiny_ae().state_dict()).items()}


def write_flux(folder: Path, variant: str = "dev", *, dtype: torch.dtype = torch.float32, prefix: str = "") -> Path:
    """Writes the transformer's file, named by its variant, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in flux_tensors(variant).items()}
    save_file(tensors, folder / f"{variant}.safetensors")
    return folder / f"{variant}.safetensors"


def write_parts(folder: Path) -> dict[str, str]:
    """Writes the other parts' files and T5's tokenizer, and returns the options that name them."""
    files = write_part_files(folder)
    write_t5_tokenizer(folder / "google_t5-v1_1-xxl")
    return {**files, "tokenizer_cache_dir": str(folder)}


def write_part_files(folder: Path, vocabulary: int = 64) -> dict[str, str]:
    """Writes the other parts' files alone; `vocabulary` is that of T5."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(clip_l_tensors(tiny_clip_l()), folder / "clip_l.safetensors")
    save_file(t5_weights(tiny_t5(T5, vocabulary=vocabulary)), folder / "t5xxl.safetensors")
    save_file(ae_tensors(), folder / "ae.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")}


def write_bundle(path: Path, variant: str = "dev") -> Path:
    """Writes one file that holds all parts, as some are published."""
    parts = {
        "model.diffusion_model.": flux_tensors(variant),
        "text_encoders.clip_l.transformer.": clip_l_tensors(tiny_clip_l()),
        "text_encoders.t5xxl.transformer.": t5_weights(tiny_t5(T5)),
        "vae.": ae_tensors(),
    }
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    save_file({**tensors, "text_encoders.t5xxl.logit_scale": torch.tensor(1.0)}, path)
    return path


def flux_options(model: str | Path, *, mapless: bool = False, **values: Any) -> Options:
    """All options of the family's network script, with their defaults but for `values`. `mapless`: no memory maps."""
    values |= {"pretrained_model_name_or_path": str(model), "disable_mmap_load_safetensors": mapless}
    return options_for("flux", "network", **values)


def _shake(model: torch.nn.Module) -> None:
    """Fresh biases and norms are all zeros and ones, so that mixed-up names would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)


def write_transformer_folder(folder: Path, variant: str = "dev", shards: str = "1GB") -> tuple[Any, dict[str, Tensor]]:
    """Writes <folder>/transformer as diffusers does. Returns: the model, and its tensors under the original names.

    Args: shards: size of the files that it is cut into.
    """
    from diffusers import FluxTransformer2DModel

    from library.families.flux.keymap import flux_map
    from library.families.flux.variants import flux_shape

    tensors = flux_tensors(variant)
    shape = flux_shape({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model = FluxTransformer2DModel(**shape.diffusers_config())
    model.load_state_dict(flux_map().to_model(tensors))
    model.save_pretrained(folder / "transformer", max_shard_size=shards)
    return model, tensors


def control_lora(path: Path, rank: int = 2, seed: int = 5) -> Path:
    """Writes a control LoRA as Black Forest Labs publish them: every layer, with biases, and the norms whole."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, tensor in flux_tensors(seed=seed).items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale":
            tensors[name] = tensor
        elif kind == "weight":
            inputs = 2 * IN_CHANNELS if layer == "img_in" else tensor.shape[1]
            tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{layer}.lora_B.weight"] = torch.randn(len(tensor), rank, generator=generator) * 0.3
            tensors[f"{layer}.lora_B.bias"] = torch.randn(len(tensor), generator=generator) * 0.1
    save_file(tensors, path)
    return path


def as_diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A control LoRA of a tiny model by diffusers' own converter, which has the numbers of the real one in it.

    It changes the halves of the modulation's rows in both matrices of the last layer, where those of the upper one are
    meant: the ranks of the lower one then no longer belong to the upper one's. Here it stays as it is.
    """
    from diffusers.loaders import lora_conversion_utils as theirs

    source = inspect.getsource(theirs._convert_bfl_flux_control_lora_to_diffusers)
    for real, tiny in (("num_layers = 19", "num_layers = 2"), ("num_single_layers = 38", "num_single_layers = 2")):
        assert real in source
        source = source.replace(real, tiny)
    names: dict[str, Any] = {}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), vars(theirs), names)
    found = names["_convert_bfl_flux_control_lora_to_diffusers"](dict(tensors))
    found["transformer.norm_out.linear.lora_A.weight"] = tensors["final_layer.adaLN_modulation.1.lora_A.weight"]
    return found
