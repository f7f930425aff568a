"""Options of prepare_buckets_latents.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits

_NO = frozenset(("", "0", "false", "no", "off", "none"))


@dataclass(frozen=True, kw_only=True)
class BucketingOptions(OptionGroup, group="bucketing", title="Buckets and latents"):
    train_data_dir: str = opt(None, "folder of images", positional=True, exists="folder")
    in_json: str = opt(None, "metadata file to read (.json or .jsonl)", positional=True, exists="file")
    out_json: str = opt(None, "metadata file to write; may be the one that is read", positional=True)
    model_name_or_path: str = opt(
        None,
        "model with the VAE that encodes the images: a file, a Diffusers folder or a hub id; or a VAE alone",
        positional=True,
    )
    v2: bool = opt(False, "the model is Stable Diffusion 2.x; not needed, as the file shows it")
    full_path: bool = opt(False, "identify images by their full path in the metadata; for several folders")
    recursive: bool = opt(False, "include sub-folders; needs --full_path")
    batch_size: int = opt(1, "images that the VAE encodes at once", at_least=1)
    max_data_loader_n_workers: int | None = opt(
        None, "threads that read images ahead; chosen automatically if not given", at_least=0
    )
    max_resolution: str = opt(
        "512,512", "maximum area of a bucket, as width,height in pixels or one side of a square",
        comma_list=True,
    )  # fmt: skip
    min_bucket_reso: int = opt(256, "shortest side of a bucket in pixels", at_least=1)
    max_bucket_reso: int = opt(1024, "longest side of a bucket in pixels", at_least=1)
    bucket_reso_steps: int = opt(64, "sides of buckets are multiples of this many pixels", at_least=1)
    bucket_no_upscale: bool = opt(False, "never enlarge images; make buckets to fit them instead")
    mixed_precision: Literal["no", "fp16", "bf16"] = opt("no", "dtype of the VAE; no means float32")
    flip_aug: bool = opt(False, "encode mirrored images too; training then mirrors half of the time")
    alpha_mask: str = opt(
        "", "store the transparency too, for --alpha_mask in training; any value except no, 0 and false"
    )
    skip_existing: bool = opt(False, "keep existing latents that are valid; without it all images are encoded again")
    seed: int = opt(
        0, "seed for sampling from the VAE's distribution; equal seeds give equal latents", at_least=0,
        at_most=2**32 - 1,
    )  # fmt: skip

    @property
    def keeps_alpha(self) -> bool:
        return self.alpha_mask.strip().lower() not in _NO

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.recursive and not self.full_path:
            yield "--recursive: needs --full_path, as images of several folders may have the same name"
        if not self.out_json.lower().endswith(".json"):
            yield f"out_json: must be a .json file, got {self.out_json!r}"
