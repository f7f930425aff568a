"""The options and traits of Stable Diffusion 1.x and 2.x. No torch here: --help needs this module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.families.shared.option_groups import CommonOptions
from library.types import BlockLayout, FamilyTraits

if TYPE_CHECKING:
    from library.options.base import Options

TRAITS = FamilyTraits(
    label="Stable Diffusion 1.x/2.x",
    text_encoders=("te",),
    latent_channels=4,
    pixel_multiple=8,
    bucket_step=64,
    objective="ddpm",
    cache_suffix="_sd.npz",
    default_resolution=512,
    sample_multiple=64,
    sample_steps=30,
    sample_scale=7.5,
    embedding_keys={"te": "emb_params"},
    block_layout=BlockLayout(12, 1, 12),
    text_regions=True,
    inpaints=True,
    hypernetworks=True,
)


class SdOptions(CommonOptions, group="family", title="Stable Diffusion 1.x/2.x"):
    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if self.v2 and self.clip_skip is not None:
            yield "--clip_skip: 2.x models always use the layer before the last; leave it out"
