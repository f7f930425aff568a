"""Trains the tiny Stable Diffusion 1.x model that this repository ships, from nothing, on images drawn by a script.

    python examples/tiny_model/train_tiny_model.py --work tiny_model_work

makes `tiny-sd.safetensors` in about two hours on two CPU cores. The stages can be run one at a time (`--stage vae`,
`denoiser`, `decoder`, `export`); each writes its result into the work folder, and `denoiser` continues where it was
stopped.

This script stands outside the toolkit's training loop on purpose: a VAE and a text encoder from random weights are
needed only here, so that the loop need not know about either.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import images as pic

from library.runtime import logs

SCALE = 0.18215  # Stable Diffusion 1.x multiplies VAE latents by this before the denoiser sees them
TEXT_WIDTH, TEXT_LAYERS = 64, 4


def new_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 128, 128),
        layers_per_block=1,
        latent_channels=4,
    )


def new_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=TEXT_WIDTH // 64,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


def new_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=pic.SIZE // 8,
        block_out_channels=(64, 128, 128, 128),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )


def cosine(step: int, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Progress:
    """Prints the running mean of a value with rate and remaining time."""

    def __init__(self, name: str, total: int, first: int = 0, every: int = 50):
        self.name, self.total, self.first, self.every = name, total, first, every
        self.start, self.sum = time.time(), 0.0

    def step(self, i: int, value: Tensor) -> None:
        self.sum += float(value)
        if (i + 1) % self.every == 0:
            rate = (i + 1 - self.first) / (time.time() - self.start)
            left = (self.total - i - 1) / rate / 60
            mean = self.sum / self.every
            print(
                f"{self.name} {i + 1}/{self.total} loss {mean:.5f} {rate:.2f} steps/s {left:.0f} min left", flush=True
            )
            self.sum = 0.0


# --- VAE --------------------------------------------------------------------------------------------------------------


def collage(rng: random.Random) -> np.ndarray:
    """Several figures of any colour over each other: teaches the VAE to encode more than the scenes hold."""
    from PIL import Image

    def any_color() -> tuple[int, ...]:
        return tuple(rng.randint(0, 255) for _ in range(3))

    side = pic.SIZE * 2
    canvas = Image.new("RGB", (side, side), any_color())
    for _ in range(rng.randint(1, 4)):
        extent = rng.randint(side // 4, int(side * 0.7))
        mask = pic.shape_mask(rng.choice((*pic.SHAPES, pic.CONCEPT_CLASS)), extent)
        canvas.paste(
            any_color(),
            (rng.randint(-extent // 3, side - extent // 2), rng.randint(-extent // 3, side - extent // 2)),
            Image.fromarray(mask),
        )
    return np.asarray(canvas.resize((pic.SIZE, pic.SIZE), Image.Resampling.BOX))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(work: Path, device: str, steps: int) -> None:
    from safetensors.torch import save_file

    rng = random.Random(1)
    images = [np.asarray(pic.draw(pic.random_scene(rng), rng)) for _ in range(15000)]
    images = np.stack(images + [collage(rng) for _ in range(5000)])
    vae = new_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = Progress("vae", steps)
    whole_from = int(steps * 0.6)  # crops first: more edges for the same work; whole images settle the group norms
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(step, steps)
        crop, batch = (32, 24) if step < whole_from else (pic.SIZE, 8)
        picked = []
        for i in (rng.randrange(len(images)) for _ in range(batch)):
            y, x = (rng.randint(0, pic.SIZE - crop) for _ in range(2))
            picked.append(images[i][y : y + crop, x : x + crop])
        pixels = to_tensor(np.stack(picked)).to(device)
        posterior = vae.encode(pixels).latent_dist
        out = vae.decode(posterior.sample()).sample
        loss = image_loss(out, pixels)
        loss = loss + 2e-5 * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.step(step, loss.detach())
    vae.eval()
    normalise_latents(vae, to_tensor(images[:2000]).to(device))
    save_file(vae.state_dict(), work / "vae.safetensors")
    with torch.no_grad():
        sample = to_tensor(images[-32:]).to(device)
        out = vae.decode(vae.encode(sample).latent_dist.mean).sample.clamp(-1, 1)
    print(f"vae: PSNR {-10 * math.log10(float(((out - sample) / 2).pow(2).mean())):.2f} dB")
    save_comparison(sample, out, work / "vae.png")


def image_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error, and the error of horizontal and vertical differences, which sharpens edges."""
    diff = out - pixels
    edges = (diff[..., 1:] - diff[..., :-1]).abs().mean() + (diff[..., 1:, :] - diff[..., :-1, :]).abs().mean()
    return diff.abs().mean() + 0.5 * diff.pow(2).mean() + 0.5 * edges


def save_comparison(pixels: Tensor, out: Tensor, path: Path) -> None:
    """The images above what the VAE made of them."""
    from PIL import Image

    both = torch.cat([pixels, out]).add(1).mul(127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
    pic.sheet([Image.fromarray(x) for x in both], columns=16).save(path)


def refine_decoder(work: Path, device: str, steps: int) -> None:
    """Trains the decoder on, with the encoder (and so the denoiser's latents) as it is: sharper images.

    Latents get a little noise, as those of the denoiser are not perfect either.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(4)
    rng = random.Random(4)
    images = [np.asarray(pic.draw(pic.random_scene(rng), rng)) for _ in range(16000)]
    pixels = to_tensor(np.stack(images + [collage(rng) for _ in range(4000)])).to(device)
    vae = new_vae()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.to(device).requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(100)])
    trained = [p for part in (vae.post_quant_conv, vae.decoder) for p in part.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    progress = Progress("decoder", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * cosine(step, steps, warmup=50)
        picked = [rng.randrange(len(latents)) for _ in range(10)]
        spread = torch.rand(10, 1, 1, 1, device=device) * 0.06 / SCALE
        noisy = latents[picked] + spread * torch.randn(10, *latents.shape[1:], device=device)
        loss = image_loss(vae.decode(noisy).sample, pixels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.step(step, loss.detach())
    save_file(vae.state_dict(), work / "vae_refined.safetensors")
    with torch.no_grad():
        save_comparison(pixels[:32], vae.decode(latents[:32]).sample.clamp(-1, 1), work / "vae_refined.png")


@torch.no_grad()
def normalise_latents(vae: nn.Module, pixels: Tensor) -> None:
    """Folds an affine map into the 1x1 convolutions around the latents, so that `SCALE * latents` has mean 0, std 1."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(100)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (SCALE * std)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] *= gain[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) * gain
    before.bias[4:] += 2 * gain.log()
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight /= gain[None, :, None, None]


# --- text encoder and denoiser ----------------------------------------------------------------------------------------


class Captions:
    """Scenes to token ids; every call words them anew."""

    def __init__(self, scenes: list[pic.Scene], seed: int):
        from library.text.tokenizers import bundled_clip_tokenizer

        self.tokenizer, self.scenes, self.rng = bundled_clip_tokenizer(), scenes, random.Random(seed)

    def __call__(self, indices: list[int], empty: float = 0.0) -> Tensor:
        texts = ["" if self.rng.random() < empty else pic.caption(self.scenes[i], self.rng) for i in indices]
        return self.tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids


def warm_up_text(text_encoder: nn.Module, scenes: list[pic.Scene], device: str, steps: int = 800) -> None:
    """Teaches the text encoder to tell the attributes apart, so that the denoiser can listen from its first step."""
    choices = {
        "shape": pic.SHAPES,
        "color": tuple(pic.COLORS),
        "background": tuple(pic.BACKGROUNDS),
        "size": tuple(pic.SIZES),
        "position": tuple(pic.POSITIONS),
        "texture": pic.TEXTURES,
    }
    heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(values)) for name, values in choices.items()}).to(device)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.0)
    captions, rng, progress = Captions(scenes, 5), random.Random(5), Progress("text", steps, every=100)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps)
        picked = [rng.randrange(len(scenes)) for _ in range(64)]
        ids = captions(picked).to(device)
        states = text_encoder(ids).last_hidden_state
        first_end = ids.eq(49407).int().argmax(1)
        after = torch.arange(77, device=device)[None] >= first_end[:, None]
        pooled = (states * after[..., None]).sum(1) / after.sum(1, keepdim=True)
        loss = 0.0
        for name, values in choices.items():
            label = torch.tensor([values.index(getattr(scenes[i], name)) for i in picked], device=device)
            loss = loss + F.cross_entropy(heads[name](pooled), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        progress.step(step, loss.detach())


def train_denoiser(work: Path, device: str, steps: int, batch: int, count: int) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    rng = random.Random(3)
    vae = new_vae()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.to(device).eval()
    scenes = [pic.random_scene(rng) for _ in range(count)]
    images = np.stack([np.asarray(pic.draw(scene, rng)) for scene in scenes])
    with torch.no_grad():
        parts = [vae.encode(to_tensor(images[i : i + 100]).to(device)).latent_dist.mean for i in range(0, count, 100)]
    latents = torch.cat(parts) * SCALE
    del vae, images, parts

    text_encoder, unet = new_text_encoder().to(device), new_unet().to(device)
    modules = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    optimizer = torch.optim.AdamW(
        [{"params": unet.parameters(), "peak": 1e-3}, {"params": text_encoder.parameters(), "peak": 3e-4}],
        betas=(0.9, 0.99),
        weight_decay=1e-3,
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    resume = work / "denoiser.pt"
    first = 0
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
        rng = random.Random(first)
        torch.manual_seed(first)
    else:
        warm_up_text(text_encoder, scenes, device)
        ema = {k: v.detach().clone() for k, v in modules.state_dict().items()}
    captions, progress = Captions(scenes, first + 11), Progress("denoiser", steps, first)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(step, steps)
        picked = [rng.randrange(count) for _ in range(batch)]
        clean = latents[picked]
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (batch,), device=device)
        a = alpha_bar[t][:, None, None, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        states = text_encoder(captions(picked, empty=0.1).to(device)).last_hidden_state
        error = (unet(noisy, t, states).sample - noise).pow(2).mean((1, 2, 3))
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        loss = (error * snr.clamp(max=5) / snr).mean()  # min-SNR-5, arXiv:2303.09556
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in modules.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - decay)
        progress.step(step, loss.detach())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1}
            torch.save(state, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)
            for part in ("text_encoder", "unet"):
                weights = {k.removeprefix(part + "."): v for k, v in ema.items() if k.startswith(part + ".")}
                save_file({k: v.contiguous() for k, v in weights.items()}, work / f"{part}.safetensors")


def export(work: Path, target: Path) -> None:
    """Writes the three parts as one Stable Diffusion 1.x file in half precision."""
    from safetensors.torch import load_file

    from library.families.sd.loading import Source
    from library.families.sd.saving import save_model
    from library.types import Models

    files = {"vae": "vae_refined", "text_encoder": "text_encoder", "unet": "unet"}
    parts = {"vae": new_vae(), "text_encoder": new_text_encoder(), "unet": new_unet()}
    for name, module in parts.items():
        module.load_state_dict(load_file(work / f"{files[name]}.safetensors"))
    source = Source(name="tiny-sd", vae_name="tiny-sd", v2=False, is_file=True)
    models = Models(parts["unet"], {"te": parts["text_encoder"]}, {}, parts["vae"], source)
    metadata = {"modelspec.title": "tiny-sd", "modelspec.architecture": "stable-diffusion-v1"}
    save_model(models, target, save_as="safetensors", dtype=torch.float16, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--stage", choices=["all", "vae", "denoiser", "decoder", "export"], default="all")
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=2800, help="steps of the denoiser and the text encoder")
    parser.add_argument("--decoder_steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=24000, help="scenes the denoiser is trained on")

    parser.add_argument("--target", type=Path, default=HERE / "tiny-sd.safetensors", help="where the model goes")
    args = parser.parse_args()
    logs.quiet_third_parties()
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.stage in ("all", "vae"):
        torch.manual_seed(2)
        train_vae(args.work, device, args.vae_steps)
    if args.stage in ("all", "denoiser"):
        train_denoiser(args.work, device, args.steps, args.batch, args.images)
    if args.stage in ("all", "decoder"):
        refine_decoder(args.work, device, args.decoder_steps)
    if args.stage in ("all", "export"):
        export(args.work, args.target)


if __name__ == "__main__":
    main()
