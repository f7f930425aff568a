"""One bidirectional map between the names (and forms) of a checkpoint file and those of the model classes.

A family writes its rules as data. Each rule knows both directions, so loading, saving, LoRA names and conversion use
the same table and cannot disagree. Names may hold placeholders: `{i}`, `{j}`, `{n}` stand for a number, `{p}` for
`weight` or `bias`, `{rest}` for anything; a placeholder keeps its value from one side to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "n": r"\d+", "p": r"weight|bias", "rest": r".+"}


class KeyMapError(UserError):
    """Keys that a map does not know, or that are missing beside others; `keys` has them all."""

    def __init__(self, what: str, keys: Sequence[str]):
        super().__init__(f"{what}: {first_few(keys)}")
        self.keys = list(keys)


def first_few(keys: Sequence[str], count: int = 5) -> str:
    """The first names for a message, and how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(list(keys)[:count]) + more


@dataclass(frozen=True)
class Rename:
    """A rule for a tensor that has another name and is otherwise the same."""

    file: str
    model: str

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The file's tensor as the model's tensors, in the order of `models`."""
        return [tensor]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return tensors[0]

    def under(self, file_prefix: str, model_prefix: str) -> Rename:
        return replace(self, file=file_prefix + self.file, model=model_prefix + self.model)


@dataclass(frozen=True)
class Conv1x1(Rename):
    """Weights (out, in, 1, 1) in the file, (out, in) in the model; biases are the same in both."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0][:, :, None, None] if tensors[0].ndim == 2 else tensors[0]


@dataclass(frozen=True)
class Transpose(Rename):
    """A matrix that the file holds the other way round."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.T.contiguous()]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].T.contiguous()


@dataclass(frozen=True)
class SwapHalves(Rename):
    """The two halves of the rows change places (shift and scale of a modulation)."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.roll(tensor.shape[0] // 2, 0)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.split(tensors[0])[0]


@dataclass(frozen=True)
class Fused:
    """One tensor in the file is several in the model, cut by rows in the proportions `rows` (equal when not given)."""

    file: str
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return self.parts

    def split(self, tensor: Tensor) -> list[Tensor]:
        shares = self.rows or (1,) * len(self.parts)
        unit, rest = divmod(tensor.shape[0], sum(shares))
        if rest:
            raise KeyMapError(f"{tensor.shape[0]} rows cannot be cut {shares}", [self.file])
        # Copies, because parts of one memory could neither be freed nor written to safetensors one by one.
        return [part.clone() for part in tensor.split([unit * share for share in shares])]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(tensors))

    def under(self, file_prefix: str, model_prefix: str) -> Fused:
        parts = tuple(model_prefix + part for part in self.parts)
        return replace(self, file=file_prefix + self.file, parts=parts)


@dataclass(frozen=True)
class Each:
    """Rules below a common prefix, on either side; `Each("a.{i}", "b.{i}", ...)` holds for every index."""

    file: str
    model: str
    rules: tuple[Rule, ...]

    def __init__(self, file: str, model: str, *rules: Rule):
        object.__setattr__(self, "file", file)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "rules", rules)


Rule = Rename | Fused | Each


@dataclass(frozen=True)
class Entry:
    """One tensor of the file and the tensors of the model that it becomes, with the rule that converts."""

    file: str
    models: tuple[str, ...]
    rule: Rename | Fused


class KeyMap:
    """The compiled rules; the first that fits a name decides."""

    def __init__(self, *rules: Rule):
        self.rules = list(_flatten(rules, "", ""))  # with the whole names on either side
        self._by_file = [(_pattern(rule.file), rule) for rule in self.rules]
        self._by_model = [(_pattern(name), rule) for rule in self.rules for name in rule.models]
        self._file_entries: dict[str, Entry | None] = {}
        self._model_entries: dict[str, Entry | None] = {}

    def by_file(self, key: str) -> Entry | None:
        """The entry of a name in the file, or None when no rule knows it."""
        return _find(key, self._by_file, self._file_entries)

    def by_model(self, key: str) -> Entry | None:
        """The entry that a model's tensor belongs to, or None when no rule knows it."""
        return _find(key, self._by_model, self._model_entries)

    def entries(self, model_keys: Iterable[str]) -> list[Entry]:
        """What the file will hold for these tensors of the model, in their order.

        Raises: KeyMapError: a name without a rule, or a fused tensor of which a part is missing.
        """
        model_keys = list(model_keys)
        found = {key: self.by_model(key) for key in model_keys}
        unknown = [key for key, entry in found.items() if entry is None]
        if unknown:
            raise KeyMapError(f"{len(unknown)} tensors of the model have no name in the file format", unknown)
        entries = {entry.file: entry for entry in found.values() if entry is not None}
        missing = [part for entry in entries.values() for part in entry.models if part not in found]
        if missing:
            raise KeyMapError("missing beside the tensors that they are stored with", missing)
        return list(entries.values())

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors under the model's names. Raises: KeyMapError: a name without a rule."""
        unknown = [key for key in tensors if self.by_file(key) is None]
        if unknown:
            raise KeyMapError(f"{len(unknown)} tensors have unknown names", unknown)
        result: dict[str, Tensor] = {}
        for key in tensors:
            entry = self.by_file(key)
            assert entry is not None
            result.update(zip(entry.models, entry.rule.split(tensors[key]), strict=True))
        return result

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors under the file's names. Raises: KeyMapError, see `entries`."""
        return {e.file: e.rule.join([tensors[name] for name in e.models]) for e in self.entries(tensors)}

    def file_name(self, module: str) -> str:
        """The file's name of a module of the model that has a weight; for a part of a fused layer, that of the whole.

        Raises: KeyMapError: no rule knows it.
        """
        return self._of_module(module).file.removesuffix(".weight")

    def groups(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """File name -> the model's modules that it covers, parts of a fused layer in the order of its rows.

        Raises: KeyMapError: no rule knows one of them.
        """
        entries = map(self._of_module, modules)
        return {e.file.removesuffix(".weight"): tuple(m.removesuffix(".weight") for m in e.models) for e in entries}

    def _of_module(self, module: str) -> Entry:
        entry = self.by_model(f"{module}.weight")
        if entry is None:
            raise KeyMapError("modules without a name in the file format", [module])
        return entry


def require_same_keys(got: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Raises: KeyMapError: keys are missing or too many; the first few are named."""
    got, wanted = set(got), set(wanted)
    if wanted - got:
        raise KeyMapError(f"{what} lacks {len(wanted - got)} tensors", sorted(wanted - got))
    if got - wanted:
        raise KeyMapError(f"{what} has {len(got - wanted)} tensors too many", sorted(got - wanted))


def _flatten(rules: Iterable[Rule], file: str, model: str) -> Iterable[Rename | Fused]:
    for rule in rules:
        if isinstance(rule, Each):
            yield from _flatten(rule.rules, _joined(file, rule.file), _joined(model, rule.model))
        else:
            yield rule.under(file, model)


def _joined(prefix: str, name: str) -> str:
    """Prefixes end with a dot unless they are empty (a level that one side does not have)."""
    return prefix if not name else f"{prefix}{name.removesuffix('.')}."


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    text = "".join(re.escape(p) if k % 2 == 0 else f"(?P<{p}>{PLACEHOLDERS[p]})" for k, p in enumerate(parts))
    return re.compile(text)


def _find(
    key: str, patterns: list[tuple[re.Pattern[str], Rename | Fused]], known: dict[str, Entry | None]
) -> Entry | None:
    if key not in known:
        known[key] = None
        for pattern, rule in patterns:
            match = pattern.fullmatch(key)
            if match:
                values = match.groupdict()
                known[key] = Entry(rule.file.format(**values), tuple(m.format(**values) for m in rule.models), rule)
                break
    return known[key]
