"""What the toolkit knows of a training method before torch is imported: one `MethodSpec` per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.method import MethodOptions

if TYPE_CHECKING:
    from library.entry_points import EntryPoint
    from library.methods.base import Method
    from library.options.base import OptionGroup, Options
    from library.types import FamilyTraits, ImageRole


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

    def __post_init__(self) -> None:
        if not any(issubclass(group, MethodOptions) for group in self.groups):
            raise TypeError(f"method {self.name!r}: none of its groups is its own; make it a subclass of MethodOptions")
