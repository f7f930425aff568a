"""Which images and captions, how they are prepared, cut into buckets, varied and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


_BUCKETS = ("enable_bucket", "dataset_config")
MOST_REPEATS = 1_000_000  # passes over one image in one epoch


def ending_problem(ending: str) -> str | None:
    """The problem with an extension of caption files, which is added to the stems of images."""
    if not ending.strip(". ") or any(sign in ending for sign in "/\\\0") or not ending.isprintable():
        return f"must be an ending of file names, e.g. .txt, got {ending!r}"
    return None


@dataclass(frozen=True, kw_only=True)
class DataOptions(OptionGroup, group="data", title="Data set"):
    of_images: ClassVar[bool] = True  # False: the method has data of its own, and nothing here describes it

    train_data_dir: str | None = opt(None, "folder of training folders named <repeats>_<identifier> <class>")
    reg_data_dir: str | None = opt(None, "folder of regularisation folders named <repeats>_<class>")
    in_json: str | None = opt(
        None,
        "metadata file (.json or .jsonl) with captions and tags of the images in --train_data_dir",
        exists="file",
    )
    dataset_config: Path | None = opt(None, "TOML or JSON file that describes the data sets, in place of folders")
    dataset_repeats: int = opt(
        1, "repeats of each image per epoch, where the data set does not set them", at_least=1, at_most=MOST_REPEATS
    )
    dataset_class: str | None = opt(
        None, "import path of your own function or class that builds the data, e.g. my_package.my_module.MyData"
    )
    conditioning_data_dir: str | None = opt(
        None,
        "folder of images that belong to those in --train_data_dir by name: masks, for --masked_loss, or for "
        "--train_inpainting",
        exists="folder",
    )
    cache_info: bool = opt(
        False, "store sizes and captions in metadata_cache.json beside the images, and use them from there from then on"
    )
    debug_dataset: bool = opt(
        False, "write contact sheets of images, masks and captions as training would see them, instead of training"
    )
    strict: bool = opt(False, "stop if an image cannot be used, instead of skipping it")
    data_index_dir: str | None = opt(
        None, "folder for the index of image sizes, captions and checksums; the user's cache folder if not given"
    )
    train_batch_size: int = opt(1, "images per batch and process", at_least=1)
    resolution: str | None = opt(
        None, "training size in pixels: one side of a square, or width,height", comma_list=True
    )

    skip_image_resolution: str | None = opt(
        None,
        "leave out images that have no more pixels than this: one side of a square, or width,height",
        comma_list=True,
    )

    caption_extension: str = opt(".caption", "extension of the caption files beside the images, e.g. .txt")
    caption_extention: str | None = opt(
        None,
        "misspelt form of --caption_extension",
        alias_of="caption_extension",
        deprecated="--caption_extension",
    )
    caption_separator: str = opt(",", "separator between the parts (tags) of a caption", verbatim=True)
    secondary_separator: str | None = opt(
        None, "separator between tags that are shuffled and dropped together, e.g. ;;;", verbatim=True
    )
    shuffle_caption: bool = opt(False, "shuffle the parts of a caption each time it is used")
    keep_tokens: int = opt(0, "number of leading caption parts that are neither shuffled nor dropped", at_least=0)
    keep_tokens_separator: str = opt(
        "",
        "separator, e.g. |||, between fixed parts of a caption and those that may be shuffled and dropped",
        verbatim=True,
    )
    enable_wildcard: bool = opt(
        False, "choose one of {a|b|c}, and one line of a multi-line caption, at random each time"
    )
    caption_prefix: str | None = opt(None, "text added before every caption", verbatim=True)
    caption_suffix: str | None = opt(None, "text added after every caption", verbatim=True)
    caption_dropout_rate: float = opt(0.0, "share of images trained with an empty caption", at_least=0, at_most=1)
    caption_dropout_every_n_epochs: int = opt(0, "train without captions in every N-th epoch; 0 = off", at_least=0)
    caption_tag_dropout_rate: float = opt(0.0, "share of caption parts dropped each time", at_least=0, at_most=1)
    token_warmup_min: int = opt(
        1,
        "caption parts used at the start of the token warm-up",
        at_least=0,
        only_with=("token_warmup_step", "dataset_config"),
    )
    token_warmup_step: float = opt(0, "step from which full captions are used; below 1, a share of the run", at_least=0)

    enable_bucket: bool = opt(
        False, "aspect ratio bucketing: train at several aspect ratios, each image at the nearest one"
    )
    min_bucket_reso: int = opt(256, "shortest side of a bucket in pixels", at_least=1, only_with=_BUCKETS)
    max_bucket_reso: int = opt(1024, "longest side of a bucket in pixels", at_least=1, only_with=_BUCKETS)
    bucket_reso_steps: int = opt(
        64, "sides of buckets are multiples of this many pixels", at_least=1, only_with=_BUCKETS
    )
    bucket_no_upscale: bool = opt(False, "never enlarge images; make buckets to fit them instead", only_with=_BUCKETS)
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None = opt(
        None, "interpolation for resizing; by default area for shrinking and lanczos for enlarging"
    )

    flip_aug: bool = opt(False, "mirror images at random, half of the time; not for asymmetrical subjects")
    color_aug: bool = opt(False, "vary hue and tone slightly")
    random_crop: bool = opt(False, "crop at a random position instead of the centre")
    face_crop_aug_range: str | None = opt(
        None,
        "crop around the face given in the file name, at a size between these two factors, e.g. 2.0,4.0",
        comma_list=True,
    )
    alpha_mask: bool = opt(False, "exclude transparent parts of images from the loss")
    train_inpainting: bool = opt(
        False,
        "train a model for inpainting, which sees the image with a part masked out: at random, or as the images of "
        "--conditioning_data_dir say; a model without inputs for that is given some",
    )

    cache_latents: bool = opt(False, "encode all images once before training and keep the latents in memory")
    cache_latents_to_disk: bool = opt(
        False, "encode all images once and keep the latents in files beside them, for this run and later ones"
    )
    skip_cache_check: bool = opt(False, "use latent files without checking their contents")
    vae_batch_size: int = opt(1, "images that the VAE encodes at once while caching", at_least=1, off=0)

    max_data_loader_n_workers: int = opt(
        8, "maximum number of processes that load images; 0 loads them in the main process", at_least=0
    )
    persistent_data_loader_workers: bool = opt(False, "keep the loading processes between epochs; saves start-up time")

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.dataset_class and not self.dataset_class.rpartition(".")[0]:
            yield f"--dataset_class: must be module.name, as in my_module.MyData, got {self.dataset_class!r}"
        if self.in_json and not self.dataset_config and not self.in_json.lower().endswith((".json", ".jsonl")):
            yield f"--in_json: must be a .json or .jsonl file, got {self.in_json!r}"
        if not (self.dataset_config or self.train_data_dir or self.in_json or self.dataset_class):
            yield "--train_data_dir: missing; name a folder of images with it, or a file with --dataset_config"
        elif self.resolution is None and not self.dataset_config:
            yield "--resolution: missing; give one number, or width,height"
        fault = ending_problem(self.caption_extension)
        if fault and self.caption_extension:
            yield f"--caption_extension: {fault}"
        if self.dataset_config and self.dataset_config.suffix.lower() not in (".toml", ".json"):
            yield f"--dataset_config: must be a .toml or .json file, got {str(self.dataset_config)!r}"
        if self.train_inpainting and not traits.inpaints:
            yield f"--train_inpainting: no model of {traits.label} that reads a mask can be trained here; leave it out"
        elif self.train_inpainting and not opts.method.trains_inpainting:
            yield "--train_inpainting: what this script trains is for models that read no mask; leave it out"
        yield from self._check_sizes(traits)
        yield from self._check_augmentation()

    def _check_sizes(self, traits: FamilyTraits) -> Iterator[str]:
        if self.skip_image_resolution is not None:
            sides = _numbers(self.skip_image_resolution, int)
            if sides is None or len(sides) > 2 or min(sides) < 0:
                wanted = "must be one number or width,height in pixels"
                yield f"--skip_image_resolution: {wanted}, got {self.skip_image_resolution!r}"
        if self.enable_bucket and self.bucket_reso_steps % traits.bucket_step:
            yield (
                f"--bucket_reso_steps: must be a multiple of {traits.bucket_step} for {traits.label}, "
                f"got {self.bucket_reso_steps}"
            )
        if self.enable_bucket and self.min_bucket_reso > self.max_bucket_reso:
            yield f"--min_bucket_reso: {self.min_bucket_reso} is above --max_bucket_reso {self.max_bucket_reso}"
        if self.resolution is None:
            return
        sides = _numbers(self.resolution, int)
        if sides is None or len(sides) > 2 or min(sides) < 1:
            yield f"--resolution: must be one number or width,height in pixels, got {self.resolution!r}"
        elif self.dataset_config:
            return  # the file may say otherwise about everything below
        elif not self.enable_bucket and min(sides) < traits.pixel_multiple:
            yield f"--resolution: sides must be at least {traits.pixel_multiple}, got {self.resolution}"
        elif self.enable_bucket and not self.bucket_no_upscale:
            low, high = self._bucket_limits()
            if min(sides) < low:
                yield f"--resolution: {self.resolution} is below --min_bucket_reso {self.min_bucket_reso}"
            if max(sides) > high:
                yield f"--resolution: {self.resolution} is above --max_bucket_reso {self.max_bucket_reso}"

    def _bucket_limits(self) -> tuple[int, int]:
        """The limits of bucket sides: the smallest rounded down, the largest rounded up to the step."""
        step = self.bucket_reso_steps
        return self.min_bucket_reso // step * step, -(-self.max_bucket_reso // step) * step

    def _check_augmentation(self) -> Iterator[str]:
        if self.face_crop_aug_range is not None:
            factors = _numbers(self.face_crop_aug_range, float)
            if factors is None or len(factors) != 2 or not 0 < factors[0] <= factors[1]:
                yield (
                    "--face_crop_aug_range: must be two factors above 0, the smaller first, e.g. 2.0,4.0; "
                    f"got {self.face_crop_aug_range!r}"
                )
        if self.cache_latents or self.cache_latents_to_disk:
            flag = "--cache_latents" if self.cache_latents else "--cache_latents_to_disk"
            for name in ("color_aug", "random_crop", "face_crop_aug_range"):
                if getattr(self, name):
                    yield f"{flag}: cannot be used with --{name}, which changes the image each time; use one of them"

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if self.skip_cache_check and not self.cache_latents_to_disk and not self.in_json and not self.dataset_config:
            yield "--skip_cache_check: has no effect without --cache_latents_to_disk"
        if self.persistent_data_loader_workers and self.max_data_loader_n_workers == 0:
            yield "--persistent_data_loader_workers: has no effect with --max_data_loader_n_workers 0"


def _numbers(text: str, kind: type) -> list | None:
    """The numbers of "a,b", or None where they are none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        return None
