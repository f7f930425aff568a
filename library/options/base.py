"""An option declared once: one dataclass field is the flag, the TOML key, the help text, the docs row and the check."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from library.screen import hide

if TYPE_CHECKING:
    from library.types import FamilyTraits

Kind = Literal["bool", "int", "float", "str", "Path", "int_or_float"]


@dataclass(frozen=True, kw_only=True)
class Details:
    """The details of an option that its annotation cannot express."""

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    lenient: bool = False  # a value out of range is warned about and counts as not given
    off: Any = None  # a value that means the same as leaving the option out
    only_with: tuple[str, ...] = ()  # options, or option=value, of which one must be in use for it to have an effect
    synonyms: Mapping[Any, Any] | None = None  # other values in circulation -> the value that they mean
    instead: Mapping[Any, str] | None = None  # values that are none of the choices -> where what they mean is to be had
    verbatim: bool = False  # white space alone is a value, as of a separator
    values: int | None = None  # of a list: how many it has, no more and no fewer; None: any number
    comma_list: bool = False  # text on the command line; a config file may also hold a number or an array
    exists: Literal["file", "folder"] | None = None  # what a value must be the path of
    deprecated: str | None = None  # what to use instead
    alias_of: str | None = None  # the option whose value this one gives
    secret: bool = False  # never written anywhere
    short: str | None = None  # another flag, of one letter, such as "-s"
    positional: bool = False  # named by its place on the command line, and always given there
    required: bool = False  # a flag that has to be given


def opt(default: Any, help: str, **details: Any) -> Any:
    """A field of an `OptionGroup`; the keywords are the fields of `Details`.

    The annotation gives type, choices and number of values: ``bool`` is a switch, ``X | None`` may be absent,
    ``Literal[...]`` lists the choices, ``list[X]`` takes any number of values, and ``int | float`` is a whole number
    of steps or a share such as 0.1 or 10%.
    """
    return field(default=default, metadata={"details": Details(help=help, **details)})


@dataclass(frozen=True)
class Option:
    """A field of a group, with its annotation taken apart."""

    dest: str
    default: Any
    kind: Kind
    many: bool
    optional: bool
    choices: tuple[Any, ...]
    details: Details

    @property
    def flag(self) -> str:
        """The option's name in messages; a positional one has no dashes."""
        return self.dest if self.details.positional else f"--{self.dest}"

    @property
    def required(self) -> str:
        """The options that it needs, e.g. "--noise_offset" or "--loss_type huber or --loss_type smooth_l1"."""
        flags = [f"--{condition.replace('=', ' ')}" for condition in self.details.only_with]
        return " or ".join(filter(None, (", ".join(flags[:-1]), flags[-1])))

    def range_problem(self, value: Any) -> str | None:
        """ "must be ..., got ..." where `value`, or an item of it, lies outside the limits."""
        limits = self.details
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            if isinstance(item, float) and not math.isfinite(item):
                return f"must be a finite number, got {item}"
            if self.kind == "int_or_float" and isinstance(item, float) and item > 1:
                return f"must be a whole number of steps or a share from 0 to 1, got {item}"
            outside = (
                (limits.at_least is not None and item < limits.at_least)
                or (limits.above is not None and item <= limits.above)
                or (limits.at_most is not None and item > limits.at_most)
                or (limits.below is not None and item >= limits.below)
            )
            if outside:
                return f"must be {self.range_text()}, got {item}"
        return None

    def range_text(self) -> str:
        """The limits in words, e.g. "at least 1"; empty where there are none."""
        limits = self.details
        words = (
            ("at least", limits.at_least),
            ("above", limits.above),
            ("at most", limits.at_most),
            ("below", limits.below),
        )
        return " and ".join(f"{word} {limit}" for word, limit in words if limit is not None)


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options that belong together. Subclasses are frozen dataclasses whose fields are made with `opt`.

    A script whose options differ has a subclass of a shared group in its place: it declares again what is different,
    and names in `without` what the script does not offer. Code that reads the group need not know.
    """

    group: ClassVar[str]  # attribute of `Options`
    title: ClassVar[str]  # heading in help and docs
    always: ClassVar[dict[str, type[OptionGroup]]] = {}  # groups that all `Options` have, offered by the script or not
    without: ClassVar[frozenset[str]] = frozenset()  # inherited fields that are no options here: always the default

    def __init_subclass__(
        cls,
        *,
        group: str | None = None,
        title: str | None = None,
        without: Iterable[str] = (),
        always: bool = False,
    ):
        cls.group, cls.title = group or cls.group, title or cls.title
        if always:
            OptionGroup.always[cls.group] = cls
        cls.without = cls.without.union(without)
        unknown = [name for name in cls.without if not hasattr(cls, name)]
        assert not unknown, f"{cls.__name__}: there is no option {unknown[0]} to leave out"

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        """One line per problem that a single value does not show, beginning with the option's flag."""
        return ()

    def warnings(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        """One line per option that works but is probably not what was meant."""
        return ()


@cache
def options_of(group: type[OptionGroup]) -> tuple[Option, ...]:
    """The options of a group, in the order of its fields."""
    hints = typing.get_type_hints(group)
    options = []
    for one in fields(group):
        if one.name in group.without:
            continue
        hint, many, choices = hints[one.name], False, ()
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # with a Literal inside it is the second
        members = set(typing.get_args(hint)) if is_union else {hint}
        optional = types.NoneType in members
        members.discard(types.NoneType)
        if len(members) == 1:
            inner = members.pop()
            if typing.get_origin(inner) is list:
                many, inner = True, typing.get_args(inner)[0]
            if typing.get_origin(inner) is Literal:
                choices = typing.get_args(inner)
                inner = type(choices[0])
            kind = inner.__name__ if inner is not Path else "Path"
        else:
            assert members == {int, float}, f"{one.name}: no option can be of type {hint}"
            kind = "int_or_float"
        options.append(Option(one.name, one.default, kind, many, optional, choices, one.metadata["details"]))
    return tuple(options)


COMMAND_LINE = "command line"


class Given(NamedTuple):
    """A value as the user gave it, and where."""

    value: Any
    source: str  # COMMAND_LINE, or the configuration file's name


class Options:
    """All options of a run: one attribute per group (`opts.loss.huber_c`), and what is known about who set them.

    A group declared with ``always=True`` is there with its defaults even where the script does not offer it, so that
    code asks `opts.swap.count` without asking for the script; `groups` holds only what the script offers.
    """

    def __init__(
        self, groups: Iterable[OptionGroup], given: Mapping[str, Given] | None = None, remarks: Iterable[str] = ()
    ):
        self.groups = tuple(groups)
        self.given = dict(given or {})
        self.remarks = tuple(remarks)  # one line for each thing that was ignored while reading them
        for name, neutral in OptionGroup.always.items():
            setattr(self, name, neutral())
        for group in self.groups:
            setattr(self, group.group, group)

    if TYPE_CHECKING:

        def __getattr__(self, group: str) -> Any: ...

    @property
    def explicit(self) -> frozenset[str]:
        """The options given on the command line or in the configuration file."""
        return frozenset(self.given)

    def has_effect(self, option: Option) -> bool:
        """Whether what the option goes with is in use; one that goes with nothing else always has an effect."""
        conditions = option.details.only_with
        return not conditions or any(map(self._holds, conditions))

    def _holds(self, condition: str) -> bool:
        name, equals, wanted = condition.partition("=")
        value = next((getattr(group, name) for group in self.groups if hasattr(group, name)), None)
        return str(value).lower() == wanted if equals else bool(value)

    def origin(self, dest: str) -> str:
        """ "command line", the configuration file's name, or "default"."""
        return self.given[dest].source if dest in self.given else "default"

    def replaced(self, **values: Any) -> Options:
        """The same options with other values for some; who set what stays as it was."""
        groups = []
        for group in self.groups:
            changes = {name: values[name] for name in values if name in vars(group)}
            groups.append(replace(group, **changes) if changes else group)
        return Options(groups, self.given, self.remarks)

    def flat(self) -> dict[str, Any]:
        """Every option's value by its name."""
        return {option.dest: getattr(g, option.dest) for g in self.groups for option in options_of(type(g))}


def build_options(
    groups: Sequence[type[OptionGroup]], given: Mapping[str, Given], remarks: Iterable[str] = ()
) -> Options:
    """Defaults, overlaid with what was given; values that mean "off" or are ignored become the default.

    So does a value out of range of an option that has no effect: it should not stop a run.
    An alias sets its target and keeps its own default, so that a value is found in one place only.
    """
    given = dict(given)
    built = []
    aliases = {o.dest: o.details.alias_of for g in groups for o in options_of(g) if o.details.alias_of}
    for alias, target in aliases.items():
        if alias in given:
            given.setdefault(target, given[alias])
    for group in groups:
        values = {}
        for option in options_of(group):
            if option.dest not in given or option.dest in aliases:
                continue
            value = given[option.dest].value
            if option.details.secret:
                hide(value)
            off = option.details.off is not None and value == option.details.off
            ignored = option.details.lenient and option.range_problem(value) is not None
            values[option.dest] = option.default if off or ignored else value
        built.append(group(**values))
    options = Options(built, given, remarks)
    idle = {
        option.dest: option.default
        for group in built
        for option in options_of(type(group))
        if option.range_problem(getattr(group, option.dest)) and not options.has_effect(option)
    }
    return options.replaced(**idle) if idle else options
