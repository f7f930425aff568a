"""Variations of the noise that drawing begins with: an offset in each channel, several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.inference.generate import initial_noise
from library.objectives.noise import host_random, multires_noise, offset_noise

if TYPE_CHECKING:
    from torch import Tensor

    from library.inference.generate import MakeNoise
    from library.inference.prompts import SamplePrompt
    from library.options.inference import ImageOptions
    from library.types import FamilyTraits

_ITERATIONS = 10  # of coarser noise, as far as the size allows
_DISCOUNTS, _OFFSETS = (0.8, 0.8), (0.1, 0.1)


def varied_noise(options: ImageOptions) -> MakeNoise | None:
    """What draws the noise that the options ask for; None: plain noise.

    Each image's own seed decides whether it has a variation, and how strong that is.
    """
    pyramid, offset = options.pyramid_noise_prob or 0.0, options.noise_offset_prob or 0.0
    if not (pyramid or offset):
        return None
    discounts = options.pyramid_noise_discount_range or _DISCOUNTS
    strengths = options.noise_offset_range or _OFFSETS

    def make(prompts: Sequence[SamplePrompt], traits: FamilyTraits, generators: Sequence[torch.Generator]) -> Tensor:
        found = []
        for prompt, generator in zip(prompts, generators, strict=True):
            noise = initial_noise([prompt], traits, [generator])
            chance = host_random(generator)
            share, discount, strength = chance.random(), chance.uniform(*discounts), chance.uniform(*strengths)
            if share < pyramid:
                noise = multires_noise(noise, generator, iterations=_ITERATIONS, discount=discount)
            if chance.random() < offset:
                noise = offset_noise(noise, noise, generator, strength=strength)
            found.append(noise)
        return torch.cat(found)

    return make
