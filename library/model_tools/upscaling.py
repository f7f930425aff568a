"""Images upscaled by two as latents, with a latent upscaler of diffusers: tools/latent_upscaler.py."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Resampling

from library.data.sample.images import read_image
from library.data.scan.folders import is_image
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.finding import family_of
from library.inference.images import save_png, to_images
from library.model_tools.drawing import load_pipeline
from library.model_tools.weights import require_device
from library.options.base import COMMAND_LINE, Given, Options, build_options
from library.options.model_files import UpscalingOptions
from library.options.preparation import WorkOptions
from library.preparation.common.images import in_batches, my_share, read_ahead
from library.preparation.common.summary import Outcome
from library.preparation.images.image_files import make_folder
from library.preparation.images.resizing import without_namesakes
from library.registry import groups_for

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

GROUPS = (UpscalingOptions, WorkOptions)
PIPELINE = "StableDiffusionLatentUpscalePipeline"
LANCZOS = Resampling.LANCZOS
MULTIPLE = 64  # pixels; the upscaler halves latents, which have an eighth of an image's side, three times


def upscale_images(opts: Options) -> Outcome:
    """Writes every image of --image_pattern with twice its sides to --output_dir.

    Sides are cut to multiples of 64 pixels, around the centre.

    Raises: UserError: no images, or an upscaler or VAE that cannot be used.
    """
    chosen = opts.upscaling
    outcome = Outcome()
    paths = sorted(Path(name) for name in glob.glob(chosen.image_pattern) if is_image(name))
    if not paths:
        raise UserError(f"--image_pattern: there are no images of the name {chosen.image_pattern}")
    target = Path(chosen.output_dir)
    if any(target.exists() and target.samefile(path.parent) for path in paths):
        raise UserError(f"--output_dir: {target} holds the images themselves; name another folder for the results")
    make_folder(target)
    device = require_device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline = load_upscaler(chosen.weights, chosen.vae_path).to(device)
    paths = my_share(without_namesakes(paths, outcome))
    read = read_ahead(paths, cut, outcome, workers=None, desc="upscaling", batch=chosen.batch_size)
    for group in batches_of_one_size(read, chosen.batch_size):
        images = pixels_of([image for _, image in group])
        encoded = torch.cat([encode(pipeline.vae, few) for few in images.split(chosen.vae_batch_size)])
        latents = upscaled(pipeline, encoded, chosen.steps, chosen.seed)
        results = {"": latents, "_vae": encoded} if chosen.debug else {"": latents}
        for ending, made in results.items():
            decoded = (image for few in made.split(chosen.vae_batch_size) for image in decode(pipeline.vae, few))
            for (path, _), image in zip(group, decoded, strict=True):
                save_png(image, target / f"{path.stem}{ending}.png", {})
        outcome.done += len(group)
    return outcome


def pixels_of(images: Sequence[np.ndarray]) -> Tensor:
    """Images (H, W, 3) of one size, 8 bits, to pixels (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def upscaled(pipeline: Any, encoded: Tensor, steps: int, seed: int) -> Tensor:
    """Scaled latents (B, 4, h, w) to those of twice the sides. Args: seed: of each image's noise."""
    generators = [torch.Generator("cpu").manual_seed(seed) for _ in encoded]
    how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0, "output_type": "latent"}
    return pipeline([""] * len(encoded), image=encoded, generator=generators, **how).images


class LatentUpscaler:
    """What --highres_fix_upscaler takes, around a pipeline of `load_upscaler`. Args: steps, seed: as for `upscaled`."""

    def __init__(self, pipeline: Any, steps: int, seed: int):
        self._pipeline, self._steps, self._seed = pipeline, steps, seed

    def upscale(self, images: Sequence[Image], width: int, height: int) -> list[Image]:
        """Images of this size, each upscaled by two from half of it, with sides rounded up to multiples of 64."""
        half = tuple(-(-side // (2 * MULTIPLE)) * MULTIPLE for side in (width, height))
        found = []
        for image in images:
            small = image if image.size == half else image.resize(half, LANCZOS)
            encoded = encode(self._pipeline.vae, pixels_of([np.array(small.convert("RGB"))]))
            (large,) = decode(self._pipeline.vae, upscaled(self._pipeline, encoded, self._steps, self._seed))
            found.append(large if large.size == (width, height) else large.resize((width, height), LANCZOS))
        return found


def create_upscaler(
    weights: str | None = None, vae_path: str | None = None, steps: str = "20", seed: str = "0"
) -> LatentUpscaler:
    """What --highres_fix_upscaler calls with the values of --highres_fix_upscaler_args, which are texts.

    Raises: UserError: no upscaler is named, it cannot be used, or a number is none.
    """
    if weights is None:
        raise UserError("--highres_fix_upscaler_args: name the latent upscaler's Diffusers folder, weights=FOLDER")
    try:
        numbers = max(1, int(steps)), int(seed)
    except ValueError:
        raise UserError(
            f"--highres_fix_upscaler_args: steps and seed must be whole numbers, got {steps!r} and {seed!r}"
        ) from None
    device = require_device("cuda" if torch.cuda.is_available() else "cpu")
    return LatentUpscaler(load_upscaler(weights, vae_path).to(device), *numbers)


def load_upscaler(name: str, vae: str | None) -> Any:
    """The pipeline of a Diffusers folder or hub id, in float32.

    Args: vae: a VAE in place of its own.
    Raises: UserError: it is no latent upscaler, or the VAE is for other latents.
    """
    if os.path.isfile(name):
        raise UserError(
            f"--weights: {name} is a weight file, and the layouts of other programs' latent upscalers are not known "
            f"here; give a Diffusers folder of {PIPELINE}, such as stabilityai/sd-x2-latent-upscaler"
        )
    pipeline = load_pipeline("--weights", name, torch.float32)
    if type(pipeline).__name__ != PIPELINE:
        raise UserError(f"--weights: {name} is a {type(pipeline).__name__}; a {PIPELINE} is needed here")
    pipeline.set_progress_bar_config(disable=True)
    if vae is not None:
        family = family_of(vae)
        given = {"vae": Given(vae, COMMAND_LINE)}
        loaded = FAMILIES[family].load_vae(build_options(groups_for(family, "network"), given))
        if loaded.config.latent_channels != pipeline.vae.config.latent_channels:
            raise UserError(
                f"--vae_path: {vae}: its latents have {loaded.config.latent_channels} channels, the upscaler's "
                f"{pipeline.vae.config.latent_channels}"
            )
        pipeline.vae = loaded
    return pipeline


def cut(path: Path) -> np.ndarray:
    """An image, (H, W, 3), with sides that are multiples of 64. Raises: OSError, ValueError: it cannot be used."""
    image = read_image(path)
    height, width = (side - side % MULTIPLE for side in image.shape[:2])
    if not height or not width:
        raise ValueError(f"is smaller than {MULTIPLE} pixels")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def batches_of_one_size(
    images: Iterable[tuple[Path, np.ndarray]], size: int
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Neighbours of one size, at most `size` of them together."""
    for _, group in groupby(images, key=lambda item: item[1].shape):
        yield from in_batches(group, size)


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, 4, H/8, W/8): the middle of what the VAE gives."""
    weight = next(vae.parameters())
    return vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> list[Any]:
    """Scaled latents (B, 4, h, w) to B images."""
    return to_images(vae.decode(latents / vae.config.scaling_factor).sample)
