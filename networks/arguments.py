"""`--network_args`: groups of arguments, and how their texts are read. No torch here."""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from library.errors import UserError
from library.options.network import LARGEST_RANK
from library.types import BlockLayout

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

UNET_25 = BlockLayout(12, 1, 12)  # of SD1/2; families with other numbers of blocks have theirs in their traits
# Arguments of LyCORIS that ask for another type of network, with the values that ask for LoRA.
_OTHER_TYPES = {"algo": ("lora", "locon"), "dora_wd": ("false", "0", ""), "train_norm": ("false", "0", "")}


class ArgumentGroup(ABC):
    """Arguments that belong together, as a frozen dataclass of their values."""

    NAMES: ClassVar[tuple[str, ...]] = ()  # as --network_args has them

    @classmethod
    @abstractmethod
    def read(cls, reader: Reader) -> Self:
        """The values; problems are collected by `reader`."""

    def warnings(self, given: Mapping[str, str], *, module: str, ranks_from_file: bool) -> list[str]:
        """A line for each of the `given` arguments that has no effect. `module` is the name for messages."""
        return []


@dataclass(frozen=True)
class LoraPlus(ArgumentGroup):
    """Factors on the learning rates of the fast side of each layer (arXiv:2402.12354). None: no such factor."""

    NAMES = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")

    denoiser: float | None = None
    text: float | None = None

    @classmethod
    def read(cls, reader: Reader) -> LoraPlus:
        common, *own = (reader.number(name, float, least=0) for name in cls.NAMES)
        return cls(*((common if ratio is None else ratio) or None for ratio in own))


def ignored(args: Mapping[str, str], names: Iterable[str], module: str) -> list[str]:
    """A line for every argument that `module`, which knows `names`, ignores."""
    names = list(names)
    others = [key for key in args if key not in names and key not in _OTHER_TYPES]
    near = {key: difflib.get_close_matches(key, names, n=1) for key in others}
    return [
        f"--network_args: {key} is ignored: {module} knows no such argument"
        + (f"; did you mean {near[key][0]!r}?" if near[key] else "")
        for key in others
    ]


def from_file_warnings(given: Mapping[str, str]) -> list[str]:
    """A line for every argument of ranks and alphas, all of which the file decides with --dim_from_weights."""
    names = [key for key in given if key.endswith(("dim", "dims", "alpha", "alphas"))]
    return [f"--network_args: {key} has no effect with --dim_from_weights" for key in names]


class Reader:
    """Reads single values and collects what is wrong with them."""

    def __init__(
        self, args: Mapping[str, str], names: Iterable[str], *, module: str, layout: BlockLayout | None = None
    ):
        """Args: names: of the arguments that are read here; module: the name for messages; layout: of block lists."""
        known = set(names)
        self.args = {name: text for name, text in args.items() if name in known}
        self.layout = layout or UNET_25
        self.problems: list[str] = []
        for name, meaning_lora in _OTHER_TYPES.items():
            if name not in known and args.get(name, meaning_lora[0]).strip().lower() not in meaning_lora:
                why = f"{module} trains no such network; --network_module networks.lycoris does"
                self.problems.append(f"--network_args: {name}={args[name]}: {why}")

    def raise_problems(self) -> None:
        """Raises: UserError: every problem that was found."""
        if self.problems:
            raise UserError(*self.problems)

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"--network_args: {key}={self.args[key]}: {why}")

    def number(
        self,
        key: str,
        kind: Callable[[str], T],
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> T | None:
        """The value, or None where it is not given or refused."""
        if not self.args.get(key, "").strip():
            return None
        try:
            value = kind(self.args[key])
        except ValueError:
            self.refuse(key, f"is not {'a whole number' if kind is int else 'a number'}")
            return None
        if kind is int:  # all of them are ranks, or parts of ranks
            most = min(most, LARGEST_RANK)
        if not (least <= value <= most and above < value < below):
            limits = {"at least": least, "above": above, "at most": most, "below": below}
            words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
            self.refuse(key, f"must be {', '.join(words) or 'a finite number'}")
            return None
        return value

    def flag(self, key: str) -> bool:
        """Whether the argument is True or 1; False, 0 and an empty value mean the same as no argument."""
        text = self.args.get(key, "").strip().lower()
        if text not in ("true", "1", "false", "0", ""):
            self.refuse(key, "is neither True nor False")
        return text in ("true", "1")

    def whole_numbers(self, key: str, count: int) -> tuple[int, ...]:
        """``[4,0,2]`` or ``4,0,2``; empty where the argument is not given."""
        if not self.args.get(key, "").strip():
            return ()
        try:
            numbers = tuple(int(entry) for entry in self.args[key].strip().strip("[]").split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count or min(numbers) < 0:
            self.refuse(key, f"is not {count} whole numbers from 0 up, separated by commas")
            return ()
        if max(numbers) > LARGEST_RANK:
            self.refuse(key, f"has an entry above {LARGEST_RANK}")
        return numbers

    def numbers(self, key: str, kind: Callable[[str], float], most: float) -> tuple[float, ...]:
        """``[1,2,1]`` or ``1,2,1``; empty where the argument is not given or refused. Args: most: of each entry."""
        text = self.args.get(key, "").strip().strip("[]()")
        if not text:
            return ()
        try:
            entries = tuple(kind(entry) for entry in text.split(","))
        except ValueError:
            entries = ()
        if not entries or not all(0 < entry <= most for entry in entries):
            what = "whole numbers" if kind is int else "numbers"
            self.refuse(key, f"is no list of {what} above 0 and up to {most:g}, separated by commas")
            return ()
        return entries

    def block_numbers(self, key: str) -> tuple[range, ...] | None:
        """``all`` (None), ``none``, or ``0,1,4-7``, where both ends count."""
        text = self.args.get(key, "all").strip()
        if text == "all":
            return None
        if text in ("none", ""):
            return ()
        ranges = []
        for entry in text.split(","):
            found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", entry)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if first > last:
                shown = "give all, none, or numbers and ranges such as 0,1,4-7"
                self.refuse(key, f"{entry.strip()!r} is no block; {shown}")
                return ()
            ranges.append(range(first, last + 1))
        return tuple(ranges)

    def block_list(self, key: str, kind: Callable[[str], T]) -> tuple[T, ...] | None:
        """One entry for each block of the layout; None where the argument is not given or refused."""
        if key not in self.args:
            return None
        try:
            entries = tuple(kind(entry) for entry in self.args[key].split(","))
        except ValueError:
            self.refuse(key, f"is not a comma-separated list of {'whole numbers' if kind is int else 'numbers'}")
            return None
        if len(entries) != self.layout.total:
            self.refuse(key, f"has {len(entries)} entries, this model has {self.layout.total} blocks")
            return None
        if not all(map(math.isfinite, entries)):
            self.refuse(key, "has an entry that is no finite number")
        elif min(entries) < 0:
            self.refuse(key, "has an entry below 0")
        elif kind is int and max(entries) > LARGEST_RANK:
            self.refuse(key, f"has an entry above {LARGEST_RANK}")
        return entries

    def by_pattern(self, key: str, kind: Callable[[str], T]) -> tuple[tuple[re.Pattern[str], T], ...]:
        """``regex=value,regex=value``; a pattern may hold "=", but no comma."""
        pairs = []
        for entry in self.args.get(key, "").split(","):
            pattern, equals, value = entry.strip().rpartition("=")
            if not entry.strip():
                continue
            try:
                if not equals or not pattern:
                    raise ValueError("is not regex=value")
                number = kind(value)
                if not 0 <= number < math.inf:
                    raise ValueError("must be at least 0")
                if kind is int and number > LARGEST_RANK:
                    raise ValueError(f"must be at most {LARGEST_RANK}")
                pairs.append((re.compile(pattern), number))
            except re.error as error:
                self.refuse(key, f"{pattern!r} is no regular expression ({error})")
            except ValueError as error:
                what = "a whole number" if kind is int else "a number"
                reason = str(error) if str(error).startswith(("is not", "must")) else f"{value!r} is not {what}"
                self.refuse(key, reason)
        return tuple(pairs)
