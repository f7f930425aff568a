"""The small tools for images: resizing, cutting around faces, edges; and what a model file says about itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.errors import UserError
from library.options.base import OptionGroup, Options, opt
from library.types import Size

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class ResizingOptions(OptionGroup, group="resizing", title="Resizing"):
    src_img_folder: str | None = opt(None, "folder of the images", positional=True)
    dst_img_folder: str | None = opt(None, "folder for the resized images; made if missing", positional=True)
    max_resolution: str = opt(
        "512x512,384x384,256x256,128x128",
        "sizes in pixels; every image is written once per size, with at most as many pixels, at its own aspect ratio",
        comma_list=True,
    )
    divisible_by: int = opt(1, "crop both sides to a multiple of this many pixels, around the centre", at_least=1)
    interpolation: Literal["area", "cubic", "lanczos4", "nearest", "linear", "box"] | None = opt(
        None, "interpolation for resizing; by default area. lanczos4 is Pillow's Lanczos, which avoids jagged edges"
    )
    save_as_png: bool = opt(False, "write PNG, which loses nothing and keeps transparency, in place of JPEG")
    copy_associated_files: bool = opt(
        False,
        "copy the files that belong to an image by name (captions, tags), under the new name; caches "
        "(.npz) are not copied, as they are of the old size",
    )
    skip_existing: bool = opt(False, "skip images whose results already exist")
    max_data_loader_n_workers: int | None = opt(
        None, "images processed at a time; by default one per processor core", at_least=0
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        try:
            sizes = parse_sizes(self.max_resolution)
        except ValueError as error:
            yield f"--max_resolution: {error}"
            return
        for size in sizes:
            if min(size) < self.divisible_by:
                yield f"--max_resolution: {size.width}x{size.height} is smaller than --divisible_by={self.divisible_by}"


@dataclass(frozen=True, kw_only=True)
class FaceOptions(OptionGroup, group="faces", title="Faces"):
    src_dir: str | None = opt(None, "folder of the images")
    dst_dir: str | None = opt(None, "folder for the results, named <name>_<cx>_<cy>_<w>_<h>; made if missing")
    model: str | None = opt(
        None,
        "ONNX file of a face detector: YuNet, or a YOLO (v5 and later) trained on faces of the kind in the images, "
        "such as anime faces",
        exists="file",
    )
    score_threshold: float = opt(
        0.9, "minimum confidence of a detected face; for YOLO models 0.5 is often better", above=0, at_most=1
    )
    rotate: bool = opt(
        False,
        "rotate each image about the face until the eyes are level; the corners are filled with the "
        "colours of the edge. Needs a model that finds eyes, such as YuNet",
    )
    resize_fit: bool = opt(False, "with --crop_size: resize the image so that the crop covers its whole shorter side")
    resize_face_size: int | None = opt(
        None, "resize the image so that the face's longer side has this many pixels", at_least=1
    )
    crop_size: str | None = opt(None, "crop width,height pixels around the face, e.g. 512,512", comma_list=True)
    crop_ratio: str | None = opt(
        None, "crop width,height times the face's longer side around the face, e.g. 3,4", comma_list=True
    )
    min_size: int | None = opt(None, "skip faces whose longer side has fewer pixels", at_least=0)
    max_size: int | None = opt(None, "skip faces whose longer side has this many pixels or more", at_least=1)
    multiple_faces: bool = opt(False, "one result for each face of an image, instead of the largest face only")
    debug: bool = opt(False, "draw the face's box, and the eyes if known, into the results")
    skip_existing: bool = opt(False, "skip images that already have a result")
    max_data_loader_n_workers: int | None = opt(
        None, "images read ahead at a time; by default one per processor core", at_least=0
    )

    def check(self, opts: Options, traits: FamilyTraits) -> Iterator[str]:
        yield from _missing(self, "src_dir", "dst_dir")
        if self.model is None:
            yield (
                "--model is required: the ONNX file of a face detector, such as YuNet's (face_detection_yunet) from "
                "the OpenCV model zoo, or a YOLO trained on anime faces"
            )
        for name, read in (("crop_size", self.crop_pixels), ("crop_ratio", self.crop_times)):
            try:
                read()
            except UserError as error:
                yield f"--{name}: {error}"
        if self.crop_size is not None and self.crop_ratio is not None:
            yield "--crop_size and --crop_ratio exclude each other"
        if self.crop_ratio is not None and self.resize_face_size is not None:
            yield "--crop_ratio keeps the size of images: leave out --resize_face_size, or use --crop_size"
        if self.resize_fit and self.crop_size is None:
            yield "--resize_fit needs --crop_size"
        if self.resize_fit and self.resize_face_size is not None:
            yield "--resize_fit and --resize_face_size exclude each other"
        if self.min_size is not None and self.max_size is not None and self.min_size >= self.max_size:
            yield "--min_size must be smaller than --max_size"

    def crop_pixels(self) -> Size | None:
        """--crop_size. Raises: UserError: not two whole numbers above 0."""
        if self.crop_size is None:
            return None
        try:
            width, height = map(int, self.crop_size.split(","))
        except ValueError:
            raise UserError(f"must be width,height in pixels, got {self.crop_size!r}") from None
        if min(width, height) < 1:
            raise UserError(f"must be above 0, got {self.crop_size!r}")
        return Size(width, height)

    def crop_times(self) -> tuple[float, float] | None:
        """--crop_ratio. Raises: UserError: not two numbers above 0."""
        if self.crop_ratio is None:
            return None
        try:
            width, height = map(float, self.crop_ratio.split(","))
        except ValueError:
            raise UserError(f"must be two numbers such as 3,4, got {self.crop_ratio!r}") from None
        if not (0 < width < 1000 and 0 < height < 1000):
            raise UserError(f"must be above 0 and below 1000, got {self.crop_ratio!r}")
        return width, height


@dataclass(frozen=True, kw_only=True)
class CannyOptions(OptionGroup, group="canny", title="Edges"):
    input: str | None = opt(None, "image, or folder of images")
    output: str | None = opt(
        None, "file for the edges, white on black; a folder, for a folder of images: PNG files of the same names"
    )
    thres1: int = opt(32, "edges weaker than this are discarded", at_least=0)
    thres2: int = opt(224, "edges stronger than this are drawn, and weaker ones connected to them", at_least=0)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterator[str]:
        yield from _missing(self, "input", "output")


@dataclass(frozen=True, kw_only=True)
class ShowMetadataOptions(OptionGroup, group="shown", title="File"):
    model: str | None = opt(None, "safetensors file: a model, or a LoRA or the like", required=True)


def parse_sizes(text: str) -> list[Size]:
    """ "512x512,384x256" to sizes in pixels. Raises: ValueError: anything else, in the form "must be ..., got ..."."""
    sizes = []
    for item in text.split(","):
        width, cross, height = item.strip().lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ValueError(f"must be sizes such as 512x512,384x384, got {text!r}")
        sizes.append(Size(int(width), int(height)))
    return list(dict.fromkeys(sizes))


def _missing(group: OptionGroup, *names: str) -> Iterator[str]:
    yield from (f"--{name} is required" for name in names if getattr(group, name) is None)
