"""The contracts of the data side: what a data set is asked for, what was found, and what training gets of it.

No torch and nothing heavy is imported, so every package above may use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from library.types import ImageRole, Size

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.sample.captions import CaptionOptions
    from library.types import Batch, TextCond


@dataclass(frozen=True)
class SubsetSpec:
    """One folder or metadata file of images, and what is done with them."""

    image_dir: Path | None  # None: the metadata file names full paths
    metadata_file: Path | None
    conditioning_data_dir: Path | None  # an image of the same name for every image
    class_tokens: str | None  # the caption of images without a caption file
    is_reg: bool
    num_repeats: int
    caption_extension: str  # with the dot
    cache_info: bool  # sizes and captions come from metadata_cache.json once that is there
    captions: CaptionOptions
    flip_aug: bool
    color_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None  # frame side / face side, (closest, widest)
    resize_interpolation: str | None  # None: area when shrinking, lanczos when enlarging
    alpha_mask: bool  # transparency weighs the loss
    custom_attributes: Mapping[str, Any] | None  # for code of the user's own, but for `timestep_offset`
    image_role: ImageRole | None = "mask"  # of the images in `conditioning_data_dir`; None: they do not matter
    inpainting: bool = False  # a part of each image is to be masked out: where its mask is bright, or at random
    masks_weigh: bool = True  # masks weigh the loss

    @property
    def timestep_offset(self) -> float:
        """What custom_attributes.timestep_sampling.offset adds to the normal numbers that timesteps are made of."""
        given = (self.custom_attributes or {}).get("timestep_sampling")
        return (given.get("offset") if isinstance(given, Mapping) else None) or 0.0

    @property
    def place(self) -> Path:
        """The folder or file that messages name."""
        return self.image_dir or self.metadata_file or Path()

    @property
    def concept(self) -> str:
        """The name under which its images are counted together."""
        return self.class_tokens or self.place.name


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share a resolution and a batch size."""

    subsets: tuple[SubsetSpec, ...]
    batch_size: int  # per process
    resolution: Size
    enable_bucket: bool
    min_bucket_reso: int  # pixels, a multiple of bucket_reso_steps
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    network_multiplier: float  # strength of the network while these images train
    validation_split: float  # share of the images that is held out, 0 to 1
    validation_seed: int | None
    resize_interpolation: str | None
    skip_image_resolution: Size | None  # images with no more pixels than this are left out
    fits_any_size: bool  # without buckets: images of another size are resized and cut, as their latents are cached


@dataclass(frozen=True, slots=True)  # there may be millions
class Record:
    """One image of one subset. The same file in another dataset is another record."""

    path: Path  # where there are latents only: the image's place without extension
    caption: str  # as the file says; see captions.make_caption
    size: Size  # of the image on disk, upright
    bucket: Size  # what the model sees
    resized: Size | None  # covers the bucket; None: no buckets, cut out as it is
    subset: SubsetSpec
    dataset: int  # index of its DatasetSpec
    repeats: int
    present: bool = True  # whether there is an image, and not only its latents
    flip: bool = False  # mirrored half of the time
    mask: Path | None = None  # an image that weighs the loss
    inpainting_mask: Path | None = None  # an image that is bright where a model for inpainting is to draw
    control: Path | None = None  # an image that a ControlNet reads
    tags: str | None = None  # of a metadata file, apart from the caption that has them joined


@dataclass
class ScanReport:
    """The findings in the files of a data set, for the report."""

    dropped: list[tuple[Path, str]] = field(default_factory=list)  # and why
    turned: int = 0  # by EXIF orientation
    moving: int = 0  # more than one frame: the first is used
    uncaptioned: int = 0  # nothing says a caption: class tokens, or nothing
    forgotten: list[Path] = field(default_factory=list)  # of these, those in folders where most have a caption
    without_words: int = 0  # of these, no class tokens either
    empty_captions: int = 0
    latents_only: int = 0
    small: dict[int, int] = field(default_factory=dict)  # dataset -> images that `skip_image_resolution` leaves out
    surplus_reg: int = 0  # regularisation images that are not used
    copies: dict[Path, Path] = field(default_factory=dict)  # files with the same bytes -> the first of them
    alike: list[list[Path]] | None = field(default_factory=list)  # images that look the same; None: not looked for
    cut: list[Path] = field(default_factory=list)  # images that lose more than half of their area to the bucket
    # masks and control images of another aspect ratio than their image's
    other_shapes: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One item of a batch, without batch axis. Either `pixels` or `latents` is there, or both, see Batch."""

    caption: str
    pixels: Tensor | None  # (3, H, W) in [-1, 1]
    latents: Tensor | None  # (C, H/8, W/8)
    mask: Tensor | None  # (1, H, W) or (1, H/8, W/8) in [0, 1]; None: all of the image counts
    loss_weight: float
    original_size: Size
    crop_top_left: tuple[int, int]
    target_size: Size
    key: str
    network_multiplier: float
    attributes: Mapping[str, Any] | None
    text: Mapping[str, Tensor] | None = None  # cached text-encoder outputs, without batch axis
    timestep_offset: float = 0.0  # see SubsetSpec
    control: Tensor | None = None  # (3, H, W) in [0, 1]; see Batch
    inpainting_mask: Tensor | None = None  # (1, H, W), 0 or 1; see Batch


class RunData(Protocol):
    """What a run asks of its data, whether that is images or something else."""

    held_out: RunData | None  # what validation looks at
    num_train_images: int  # images times repeats, without regularisation
    num_reg_images: int

    @property
    def batches_per_epoch(self) -> int:
        """Over all processes."""

    def set_total_steps(self, steps: int) -> None:
        """Called once the length of the run, in optimizer steps, is known."""

    def loader(self, epoch: int, first_batch: int = 0, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        """One process's batches of an epoch (from 1), without the first ones. All processes get equally many."""

    def sizes(self) -> dict[Size, str]:
        """The sizes of images that the denoiser will see, each with the words before it in a message."""

    def batch_sizes(self) -> list[int]:
        """The sizes that batches have, ascending."""

    def batch_shapes(self) -> set[tuple[int, Size]]:
        """(images, their size in pixels) of every batch of an epoch, the last ones of buckets included."""

    def example(self) -> tuple[str, Size]:
        """A text that is trained on, and the size of its image."""

    def content(self) -> list[str]:
        """A line for each thing that is trained on, sorted; other lines are other data."""

    def findings(self) -> list[tuple[str, list[tuple[Path, str]]]]:
        """What was found in images: titles, each with the files that it concerns, and what is to be said of each."""

    def report(self) -> list[str]:
        """The lines for the log."""

    def metadata(self, processes: int = 1) -> dict[str, Any]:
        """The ss_* values that describe the data."""


class PromptedData(RunData, Protocol):
    """Data without images, whose texts never change and are encoded once."""

    @property
    def texts(self) -> Sequence[str]:
        """All texts that occur, each once."""

    def set_texts(self, encoded: Mapping[str, TextCond]) -> None:
        """Makes batches carry the conditioning of each of `texts`, which is for one item, on the CPU."""


class ItemKey(NamedTuple):
    """The position of an item in the run: epoch, step and index."""

    epoch: int  # counted from 1
    step: int  # optimizer steps finished before it
    index: int


class LatentEntry(Protocol):
    """The latents of one record, in memory or in a file. Picklable."""

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        """(latents (C, H/8, W/8), mask as `Sample.mask`), of the mirrored image with `flip`, on the CPU.

        Raises: UserError: its file is gone or damaged.
        """


class TextStore(Protocol):
    """Text-encoder outputs by record, in memory or in files. Picklable."""

    def get(self, number: int) -> Mapping[str, Tensor]:
        """One record's tensors on the CPU, without batch axis. Raises: UserError: its file is gone or damaged."""
