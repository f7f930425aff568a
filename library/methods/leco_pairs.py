"""The prompt file of concept editing: pairs of prompts, or sliders that are expanded to pairs. No torch.

Two forms of one TOML file. `[[prompts]]` holds pairs as they are. `[[targets]]`, at the top or below `[slider]`, holds
sliders: texts for the two ends of a property, of which two or four pairs are made for every neutral text and size.
Keys at the top are defaults of all entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.errors import UserError
from library.options.nearest import did_you_mean
from library.runtime.documents import read_text, read_toml
from library.runtime.logs import LOGGER
from library.types import Size

if TYPE_CHECKING:
    from library.types import FamilyTraits

OPTION = "--prompts_file"
ACTIONS = ("erase", "enhance")


@dataclass(frozen=True)
class PromptPair:
    """What one training step teaches: what `target` should look like, said by three other texts."""

    target: str  # the text whose predictions are changed
    positive: str  # the concept
    unconditional: str  # what the concept is compared with
    neutral: str  # what predictions of `target` start from
    action: Literal["erase", "enhance"] = "erase"
    guidance_scale: float = 1.0  # how far away from the concept, or towards it
    size: Size = Size(512, 512)  # noqa: RUF009  # a tuple
    dynamic_resolution: bool = False  # each side is drawn between half and all of it; squares only
    dynamic_crops: bool = False  # conditions on sizes say that a part of a larger image is seen
    batch_size: int = 1  # noises at once
    multiplier: float = 1.0  # strength of the network while this is taught
    weight: float = 1.0  # of the loss

    @property
    def texts(self) -> tuple[str, str, str, str]:
        return self.target, self.positive, self.neutral, self.unconditional

    def __str__(self) -> str:
        sign = "-" if self.action == "erase" else "+"
        return (
            f"{self.target!r} at {self.multiplier:g} -> {self.neutral!r} {sign} {self.guidance_scale:g} x "
            f"({self.positive!r} - {self.unconditional!r}), {self.size.width}x{self.size.height}"
        )


_TEXTS = ("target", "positive", "unconditional", "neutral")
_NUMBERS, _SWITCHES = ("guidance_scale", "multiplier", "weight"), ("dynamic_resolution", "dynamic_crops")
_COMMON = (*_NUMBERS, *_SWITCHES, "batch_size", "resolution")  # of both forms
_OF_PAIRS = (*_TEXTS, "action", *_COMMON)
_FILES = ("neutral_prompt_file", "prompt_file")
_OF_SLIDERS = ("target_class", "positive", "negative", "neutral", "neutrals", *_FILES, "resolutions", *_COMMON)


def read_pairs(path: str | Path, traits: FamilyTraits, *, remarks: bool = True) -> list[PromptPair]:
    """The pairs of a prompt file, in its order; a slider's are made here.

    Args: remarks: whether what has no effect is logged.
    Raises: UserError: the file cannot be read, or every problem in it.
    """
    content = read_toml(path, "the prompt file", option=OPTION)
    reader = _Reader(Path(path), traits, remarks)
    pairs = list(reader.pairs(content))
    if not pairs and not reader.problems:
        reader.problems.append(f"{OPTION}: {path} holds neither [[prompts]] nor [[targets]]")
    if reader.problems:
        raise UserError(*dict.fromkeys(reader.problems))
    for size in dict.fromkeys(pair.size for pair in pairs if pair.dynamic_resolution):
        if remarks and size.width != size.height:
            LOGGER.warning("%s: dynamic_resolution has no effect at %dx%d, as only squares vary", path, *size)
    return pairs


class _Reader:
    """Turns tables into pairs, and collects every problem on the way."""

    def __init__(self, path: Path, traits: FamilyTraits, remarks: bool):
        self.path, self.traits, self.remarks = path, traits, remarks
        self.problems: list[str] = []

    def pairs(self, content: Mapping[str, Any]) -> Iterator[PromptPair]:
        slider = content.get("slider", {})
        if not isinstance(slider, Mapping):
            return self._wrong("[slider]", "must be a table")
        outer = {**content, **slider}
        prompts = self._tables(content, "prompts")
        targets = self._tables(outer, "targets")
        if targets is None and prompts is None and {"target", "target_class"} & outer.keys():
            targets = [outer]  # one target, whose keys are at the top
        else:
            known = {*_OF_PAIRS, *_OF_SLIDERS, "prompts", "targets", "slider"}
            self._warn_of_unknown(outer, known, "the top of the file")
        for number, table in enumerate(prompts or (), 1):
            place = f"[[prompts]] {number}"
            kind = self._slider if "target_class" in table else self._pair
            yield from kind(table, content, place)
        as_pairs = bool(targets) and "target" in targets[0]
        for number, table in enumerate(targets or (), 1):
            yield from (self._pair if as_pairs else self._slider)(table, outer, f"[[targets]] {number}")

    def _tables(self, content: Mapping[str, Any], name: str) -> list[Mapping[str, Any]] | None:
        """The tables of an array; None: it is not there."""
        if name not in content:
            return None
        found = content[name]
        if isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found):
            return found
        self._note(f"[[{name}]]", "must be tables, one for each entry, and at least one")
        return []

    # ---- one entry

    def _pair(self, table: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> Iterator[PromptPair]:
        if table is not outer:
            for key in sorted(table.keys() - set(_OF_PAIRS)):
                self._note(place, f"unknown key {key!r}{did_you_mean(key, _OF_PAIRS)}")
        found = self._common(table, outer, place)
        texts = {name: self._text(name, table, outer, place) for name in _TEXTS}
        if texts["target"] is None:
            self._note(place, "has no target, the prompt that is to change")
            return
        action = _first("action", table, outer, default="erase")
        if action not in ACTIONS:
            self._note(place, f"action must be erase or enhance, got {action!r}")
            return
        unconditional = texts["unconditional"] or ""
        for size in self._sizes(table, outer, place, ("resolution",)):
            yield PromptPair(
                target=texts["target"],
                positive=texts["target"] if texts["positive"] is None else texts["positive"],
                unconditional=unconditional,
                neutral=unconditional if texts["neutral"] is None else texts["neutral"],
                action=action,
                size=size,
                **found,
            )

    def _slider(self, table: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> Iterator[PromptPair]:
        if table is not outer:
            self._warn_of_unknown(table, set(_OF_SLIDERS), place)
        texts = {name: self._text(name, table, {}, place) or "" for name in ("target_class", "positive", "negative")}
        if not texts["positive"].strip() and not texts["negative"].strip():
            self._note(place, "needs positive or negative, the prompts of the slider's two ends")
            return
        common = self._common(table, outer, place)
        sizes = list(self._sizes(table, outer, place, ("resolutions", "resolution")))
        for neutral in self._neutrals(table, outer, place):
            for size in sizes:
                base = PromptPair(texts["target_class"], "", "", neutral, size=size, **common)
                yield from _expanded(base, texts["positive"], texts["negative"])

    def _common(self, table: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The values of what both forms have, but for sizes; a wrong one is noted, and its default stands in."""
        defaults = {field.name: field.default for field in fields(PromptPair)}
        found = {}
        for name in (*_NUMBERS, *_SWITCHES, "batch_size"):
            value = _first(name, table, outer, default=defaults[name])
            if name in _SWITCHES:
                right, what = isinstance(value, bool), "true or false"
            elif name == "batch_size":
                right, what = _is_whole(value) and 1 <= value <= 1024, "a whole number from 1 to 1024"
            else:
                right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6
                what = "a number"
            if not right:
                self._note(place, f"{name} must be {what}, got {value!r}")
            found[name] = value if right else defaults[name]
        return found

    def _text(self, name: str, table: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> str | None:
        value = _first(name, table, outer)
        if value is None or isinstance(value, str):
            return value
        return self._note(place, f"{name} must be a text, got {value!r}")

    def _sizes(
        self, table: Mapping[str, Any], outer: Mapping[str, Any], place: str, names: Sequence[str]
    ) -> Iterator[Size]:
        """The sizes of an entry: one, or several where `resolutions` has several."""
        own = [(name, level[name]) for level in (table, outer) for name in names if name in level]
        name, value = own[0] if own else ("resolution", PromptPair.size.height)
        flat = isinstance(value, list) and len(value) == 2 and all(_is_whole(side) for side in value)
        listed = value if name == "resolutions" and isinstance(value, list) and not flat else [value]
        for one in listed:
            sides = [one, one] if _is_whole(one) else one
            two = isinstance(sides, list) and len(sides) == 2 and all(map(_is_whole, sides))
            if not two or min(sides) < 1:
                self._note(place, f"{name} must be a number of pixels or [height, width], got {one!r}")
                continue
            step = self.traits.pixel_multiple
            if any(side % step or side > 1 << 14 for side in sides):
                self._note(place, f"{name}: sides must be multiples of {step} for {self.traits.label}, got {one!r}")
                continue
            yield Size(sides[1], sides[0])

    def _neutrals(self, table: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> list[str]:
        """The neutral texts of a slider: its own, or else those at the top, or else no words."""
        for level in (table, outer):
            found: list[str] = []
            listed = level.get("neutrals", [])
            if isinstance(listed, list) and all(isinstance(text, str) for text in listed):
                found += listed
            else:
                self._note(place, f"neutrals must be a list of texts, got {listed!r}")
            for name in _FILES:
                if name in level:
                    found += self._lines(level[name], name, place)
            if not found and "neutral" in level:
                found.append(self._text("neutral", level, {}, place) or "")
            if found:
                return found
        return [""]

    def _lines(self, file: Any, name: str, place: str) -> list[str]:
        if not isinstance(file, str):
            self._note(place, f"{name} must be the name of a file, got {file!r}")
            return []
        try:
            text = read_text(self.path.parent / file, "the file of neutral prompts")
        except UserError as error:
            for problem in error.problems:
                self._note(place, f"{name}: {problem}")
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]

    # ---- problems

    def _note(self, place: str, text: str) -> None:
        self.problems.append(f"{OPTION}: {self.path}, {place}: {text}")

    def _wrong(self, place: str, text: str) -> Iterator[PromptPair]:
        self._note(place, text)
        return iter(())

    def _warn_of_unknown(self, table: Mapping[str, Any], known: Iterable[str], place: str) -> None:
        for key in sorted(table.keys() - set(known)) if self.remarks else ():
            LOGGER.warning(
                "%s: %s, %s: %r has no effect%s", OPTION, self.path, place, key, did_you_mean(key, sorted(known))
            )


def _first(name: str, *tables: Mapping[str, Any], default: Any = None) -> Any:
    return next((table[name] for table in tables if name in table), default)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expanded(base: PromptPair, positive: str, negative: str) -> Iterator[PromptPair]:
    """The pairs of a slider: at its strength more of `positive` and less of `negative`, at the opposite the reverse."""
    more, less = base.multiplier, -base.multiplier
    if positive.strip() and negative.strip():
        ways = (
            (negative, positive, "erase", more),
            (positive, negative, "enhance", more),
            (positive, negative, "erase", less),
            (negative, positive, "enhance", less),
        )
    elif negative.strip():
        ways = ((negative, "", "erase", more), (negative, "", "enhance", less))
    else:
        ways = ((positive, "", "enhance", more), (positive, "", "erase", less))
    for concept, compared, action, multiplier in ways:
        yield replace(base, positive=concept, unconditional=compared, action=action, multiplier=multiplier)
