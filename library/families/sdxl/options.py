"""The options and traits of SDXL. No torch here: --help needs this module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.families.shared.option_groups import CommonOptions
from library.types import BlockLayout, FamilyTraits

if TYPE_CHECKING:
    from library.options.base import Options

TRAITS = FamilyTraits(
    label="SDXL",
    text_encoders=("te1", "te2"),
    latent_channels=4,
    pixel_multiple=8,
    bucket_step=32,
    objective="ddpm",
    cache_suffix="_sdxl.npz",
    default_resolution=1024,
    sample_multiple=32,
    sample_steps=30,
    sample_scale=7.5,
    embedding_keys={"te1": "clip_l", "te2": "clip_g"},
    block_layout=BlockLayout(9, 3, 9, edge=1),
    text_regions=True,
    inpaints=True,
    pooled_by_image=True,
)


class SdxlOptions(CommonOptions, group="family", title="SDXL"):
    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().check(opts, traits)
        if opts.text_cache.in_use and not opts.method.network_train_unet_only:
            yield (
                "--cache_text_encoder_outputs: text encoders whose outputs are cached cannot be trained; "
                "add --network_train_unet_only"
            )

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        yield from super().warnings(opts, traits)
        if self.v2:
            yield f"--v2: has no effect on {traits.label}"
        if self.clip_skip is not None:
            yield f"--clip_skip: has no effect on {traits.label}, which always reads the layer before the last"
