"""What the toolkit knows of a training method before torch is imported: one `MethodSpec` per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.data import DataOptions
from library.options.method import MethodOptions

if TYPE_CHECKING:
    from library.data.types import RunData
    from library.entry_points import EntryPoint
    from library.families.base import Family
    from library.methods.base import Method
    from library.objectives.objective import Objective
    from library.options.base import OptionGroup, Options
    from library.types import Denoise, Draw, FamilyTraits, ImageRole


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A training method. Raises: TypeError: on construction, where a part is missing."""

    name: str  # as entry scripts and `FamilySpec.scripts` have it
    title: str  # of its scripts' help; "{model}" stands for the family's label
    tracker: str  # name of the folder or project that logs go to, where --log_tracker_name gives none
    groups: tuple[type[OptionGroup], ...]  # the method's own group, and others in place of shared ones
    method: EntryPoint[[Options], Method]
    # Problems that options and file headers show, beside those that the groups find.
    check: Callable[[Options, FamilyTraits], list[str]] = lambda opts, traits: []
    # Options of gen_img.py for a saved file, {file}; "{stem}" is its name without ending. None: it does not read them.
    usage: str | None = None
    image_role: ImageRole = "mask"  # what the images of `conditioning_data_dir` are to it
    complete_options: Callable[[Options], Options] = lambda opts: opts  # by what other options say
    # Of a method that trains without images: its own data, made of (options, traits, number of processes), and what
    # becomes of one of its batches in a step. The seed is known by then. None: images.
    data: EntryPoint[[Options, FamilyTraits, int], RunData] | None = None
    draw: EntryPoint[[Method, Family, Objective, Denoise], Draw] | None = None
    # The same in a plan, where tensors have no values and so no times: a step of mean length.
    planned_draw: EntryPoint[[Method, Family, Objective, Denoise], Draw] | None = None

    def __post_init__(self) -> None:
        without_images = any(issubclass(group, DataOptions) and not group.of_images for group in self.groups)
        given = {part is not None for part in (self.data, self.draw, self.planned_draw)}
        if {without_images, *given} not in ({True}, {False}):
            raise TypeError(
                f"method {self.name!r}: without images it has data, draw, planned_draw, and options of data with "
                "of_images = False"
            )
        if not any(issubclass(group, MethodOptions) for group in self.groups):
            raise TypeError(f"method {self.name!r}: none of its groups is its own; make it a subclass of MethodOptions")
