"""Edges of images, white on black, as ControlNets are trained with them: tools/canny.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.data.sample import images
from library.data.sample.opencv import opencv
from library.errors import UserError
from library.options.base import Options
from library.options.image_tools import CannyOptions
from library.options.preparation import WorkOptions
from library.preparation.common.images import find_images, my_share, read_ahead
from library.preparation.common.summary import Outcome
from library.preparation.images.image_files import WriteError, encoded, make_folder, writable_suffix, write_file
from library.preparation.images.resizing import without_namesakes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUPS = (CannyOptions, WorkOptions)


def draw_edges(opts: Options) -> Outcome:
    """Writes the edges of --input, an image or every image of a folder, to --output.

    Raises: UserError: no such image or folder, or no place that its edges can be written to.
    """
    opencv()
    source, target = Path(opts.canny.input), Path(opts.canny.output)
    outcome = Outcome()
    if source.is_dir():
        make_folder(target)
        paths = my_share(without_namesakes(find_images(source, recursive=False), outcome))
        results = {path: target / f"{path.stem}.png" for path in paths}
        if target.samefile(source):
            raise UserError(f"{target}: give another folder for the results, or they would replace the images")
    else:
        if not source.is_file():
            raise UserError(f"--input={source}: no such file or folder")
        if target.is_dir():
            target = target / f"{source.stem}.png"
        if target.exists() and target.samefile(source):
            raise UserError(f"--output={target}: the edges would replace the image; give another name or folder")
        if target.suffix == "" or writable_suffix(target.suffix) != target.suffix:
            raise UserError(f"--output={target}: must end in .png, .jpg, .webp or .bmp, or be a folder that is there")
        make_folder(target.parent)
        results = {source: target}

    def work(path: Path) -> WriteError | None:
        edges = canny(images.read_image(path), opts.canny.thres1, opts.canny.thres2)
        content = encoded(edges, results[path].suffix)
        try:
            return write_file(results[path], content)
        except WriteError as error:
            return error

    for _, problem in read_ahead(list(results), work, outcome, workers=None, desc="drawing edges"):
        if problem is not None:
            raise UserError(str(problem))
        outcome.done += 1
    return outcome


def canny(pixels: NDArray[np.uint8], low: int, high: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3) to edges (H, W), 255 on 0, by the two thresholds of Canny's method."""
    return opencv().Canny(pixels, low, high)
