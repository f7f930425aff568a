"""What a network file is, whether it is sound, how much it changes, and who reads it: tools/verify_lora.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from library.checkpoints.keymap import first_few
from library.checkpoints.reading import read_names, read_state_dict
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.shared.network_readers import DORA, PROGRAMS
from library.model_tools.converting import layout_of
from library.model_tools.model_sources import ModelSource, open_sources
from library.model_tools.network_blocks import OUTSIDE, PREFIX, block_of, run_order
from library.model_tools.network_norms import change_norm, full_change_norm, norm, require_shape
from library.runtime.logs import progress
from networks.file_names import require_places, require_types
from networks.files import NetworkFile, names_in_files, read
from networks.fused import unstacked
from networks.registry import BOFT, LOCON, LORA, OFT, STACK, type_of

if TYPE_CHECKING:
    from library.checkpoints.layer_names import PartNames
    from library.types import LoraTarget

OUTLIER = 10  # times the median of a part's layers
_ENOUGH = 8  # layers of a part from which a median says something
_SMALL_KERNEL = (1, 1)


@dataclass
class Layer:
    """One layer of the file."""

    name: str  # kohya's
    part: str  # "unet", or kohya's name of a text encoder
    block: str
    type: str
    rank: int | None
    alpha: float | None
    change: float | None = None  # norm of the change of the weight
    weight: float | None = None  # norm of the weight; None without a model

    @property
    def relative(self) -> float | None:
        return self.change / self.weight if self.change is not None and self.weight else None


@dataclass
class Block:
    """The layers of a block together."""

    part: str
    name: str
    layers: int
    change: float | None
    weight: float | None

    @property
    def relative(self) -> float | None:
        return self.change / self.weight if self.change is not None and self.weight else None


@dataclass
class Report:
    """All that was found. Where there are `errors`, the file is not usable."""

    path: Path
    layout: str | None = None
    family: str | None = None
    layers: list[Layer] = field(default_factory=list)
    in_file: int = 0  # layers by the file's own names, of which several may be one layer of the model
    model: str | None = None
    unmatched: list[str] = field(default_factory=list)  # layers that have no place in the model or family
    # For each program the number of layers that it reads, and how many it does not read for which reason.
    programs: dict[str, tuple[int, Counter[str]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0: usable; 1: usable, with warnings; 2: not usable."""
        return 2 if self.errors else int(bool(self.warnings))

    def blocks(self) -> list[Block]:
        """By part, in the order in which the model runs them."""
        grouped: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.layers:
            grouped.setdefault((layer.part, layer.block), []).append(layer)
        parts = list(dict.fromkeys(part for part, _ in grouped))
        order = sorted(grouped, key=lambda place: (parts.index(place[0]), *run_order(place[1])))
        return [_block(*place, grouped[place]) for place in order]


def verify(path: str | Path, model: str | None = None, encoders: Mapping[str, str] | None = None) -> Report:
    """Looks at a network file, and at how it fits a model.

    Args:
        model: a model's file or Diffusers folder; its weights are read one at a time.
        encoders: files of its text encoders by their names, "te1" and so on.
    Raises: UserError: the model cannot be used. What is wrong with the network file is in the report.
    """
    report = Report(Path(path))
    sources = open_sources(model, encoders or {}) if model else []
    try:
        file = read(path)
        require_types(file.path, file.flat())
    except UserError as error:
        report.errors += error.problems
        return report
    report.in_file = len(file.entries)
    report.layout = layout_of(names_in_file(path))
    broken = [name for name, tensor in file.flat().items() if not tensor.double().isfinite().all()]
    if broken:
        report.errors.append(f"{file.path}: {len(broken)} tensors hold NaN or infinite values: {first_few(broken)}")
    if sources:
        report.model = model
        report.family = sources[0].family
        _measure_in_model(file, sources, report)
    else:
        found = _recognised(file)
        report.family = found[0] if found else None
        _measure_alone(file, found[1] if found else (), report)
    if not report.errors:
        _find_suspicious(report)
    if report.family is not None:
        for program in PROGRAMS:
            facts = ((one.part, one.type, one.block != OUTSIDE) for one in report.layers)
            why = [program.unread(report.family, report.layout, *each) for each in facts]
            report.programs[program.name] = (why.count(None), Counter(reason for reason in why if reason is not None))
    return report


def _block(part: str, name: str, layers: Sequence[Layer]) -> Block:
    change, weight = _together(layer.change for layer in layers), _together(layer.weight for layer in layers)
    return Block(part, name, len(layers), change, weight)


def type_label(entry: Mapping[str, Tensor]) -> str:
    """The word for a layer's type, as in tables of who reads what."""
    kind = type_of(entry)
    assert kind is not None
    if kind == STACK:
        return type_label(next(piece for _, piece in unstacked(entry) if piece))
    if "dora_scale" in entry:
        return DORA
    if kind in (LORA, LOCON):
        kernel = tuple(entry["lora_down.weight"].shape[2:])
        return LOCON.label if "lora_mid.weight" in entry or kernel not in ((), _SMALL_KERNEL) else LORA.label
    if kind == OFT and "oft_blocks" in entry and entry["oft_blocks"].dim() == 4:
        return BOFT.label
    return kind.label


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure_in_model(file: NetworkFile, sources: Sequence[ModelSource], report: Report) -> None:
    """The layers that have a place in the model, in its order."""
    places: dict[str, tuple[ModelSource, LoraTarget]] = {}
    for source in sources:
        for target in source.targets:
            places.setdefault(target.key, (source, target))
    targets = [target for _, target in places.values()]
    known = names_in_files(targets)
    report.unmatched = [layer for layer in file.entries if layer not in known]
    try:
        require_places(file.path, file.entries, known)
        entries = file.matching(targets, lambda target: places[target.key][0].rows(target))
    except UserError as error:
        report.errors += error.problems
        return
    with progress(len(entries), "measuring", unit="layers") as bar:
        for key, entry in entries.items():
            source, target = places[key]
            layer = _layer(key, entry)
            try:
                weight = source.weight(target)
                if target.grows:  # the new inputs of control LoRAs
                    inputs = entry["lora_down.weight"].shape[1] if "lora_down.weight" in entry else 0
                    weight = pad(weight, (0, max(inputs - weight.shape[1], 0)))
                require_shape(entry, weight.shape)
                change = change_norm(entry)
                if change is None:
                    change = full_change_norm(entry, weight.shape, lambda weight=weight: weight)
            except UserError as error:
                report.errors += [f"{file.path}: {key}: {problem}" for problem in error.problems]
                continue
            layer.change, layer.weight = _finite(change), _finite(norm(weight))
            report.layers.append(layer)
            bar.update()


def _measure_alone(file: NetworkFile, parts: Sequence[PartNames], report: Report) -> None:
    """All layers, without a model: what depends on its weights stays unknown."""
    report.unmatched = [name for name in file.entries if parts and not _is_known(name, parts)]
    for name, entry in file.entries.items():
        layer = _layer(name, entry)
        try:
            layer.change = _finite(change_norm(entry))
        except (UserError, RuntimeError) as error:  # matrices that do not belong together
            report.errors.append(f"{file.path}: {name}: {str(error).splitlines()[0]}")
            continue
        report.layers.append(layer)


def _layer(name: str, entry: Mapping[str, Tensor]) -> Layer:
    alpha = _finite(float(entry["alpha"])) if "alpha" in entry else None
    down = next(
        (entry[key] for key in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in entry), None
    )
    rank = None if down is None else len(down)
    return Layer(name, *block_of(name), type_label(entry), rank, alpha)


def _finite(value: float | None) -> float | None:
    """What is no number is not known: the report has the tensors at fault among its errors."""
    return value if value is not None and isfinite(value) else None


def _recognised(file: NetworkFile) -> tuple[str, tuple[PartNames, ...]] | None:
    """The family that knows most layers, and the parts of its models; None where none does, or several alike."""
    sizes = {
        layer: (len(entry["lora_up.weight"]), entry["lora_down.weight"].shape[1])
        for layer, entry in file.entries.items()
        if "lora_down.weight" in entry
    }
    parts = {name: spec.layer_names(sizes) for name, spec in FAMILIES.items()}
    known = {name: sum(_is_known(layer, parts[name]) for layer in file.entries) for name in parts}
    most = max(known.values())
    best = [name for name, count in known.items() if count == most]
    return (best[0], parts[best[0]]) if most and len(best) == 1 else None


def _is_known(layer: str, parts: Sequence[PartNames]) -> bool:
    name = PREFIX.sub(r"lora_\g<part>_\g<path>", layer)
    return any(part.find(name) is not None for part in parts)


# --- judging ----------------------------------------------------------------------------------------------------------


def names_in_file(path: str | Path) -> list[str]:
    """The names of the tensors as they are in the file."""
    names = read_names(path)
    return list(read_state_dict(path) if names is None else names)


def _find_suspicious(report: Report) -> None:
    """Layers that do nothing, have no place, or change much more than the others of their part."""
    path, measured = report.path, [layer for layer in report.layers if layer.change is not None]
    idle = [layer.name for layer in measured if layer.change == 0]
    if idle and len(idle) == len(report.layers):
        report.warnings.append(f"{path}: changes nothing: all {len(idle)} layers are zero")
    elif idle:
        report.warnings.append(f"{path}: {len(idle)} of {len(report.layers)} layers are zero: {first_few(idle)}")
    if report.family is None:
        report.warnings.append(f"{path}: its layers are of no model that is known here, or of several; give --model")
    if report.unmatched:
        where = report.model or (FAMILIES[report.family].traits.label if report.family else "any known model")
        count = len(report.unmatched)
        report.warnings.append(
            f"{path}: {count} of {report.in_file} layers have no place in {where}: {first_few(report.unmatched)}"
        )
    for part in dict.fromkeys(layer.part for layer in measured):
        own = [layer for layer in measured if layer.part == part and layer.change]
        sizes = {layer.name: layer.change if layer.relative is None else layer.relative for layer in own}
        if len(sizes) < _ENOUGH:
            continue
        middle = median(sizes.values())
        far = {name: size / middle for name, size in sizes.items() if size > OUTLIER * middle}
        if far:
            worst = sorted(far, key=lambda name: -far[name])
            report.warnings.append(
                f"{path}: {len(far)} layers of {part} change more than {OUTLIER} times as much as its median: "
                + first_few([f"{name} ({far[name]:.0f} times)" for name in worst], 3)
            )
    whole = _block("", "", measured)
    if whole.relative is not None and whole.relative > 1:
        report.warnings.append(
            f"{path}: its change is {whole.relative:.1f} times as large as the weights; use a small multiplier, or "
            "look at its alpha"
        )


def _together(norms: Iterator[float | None]) -> float | None:
    """The norm of several tensors as one; None where one is unknown."""
    values = list(norms)
    return None if None in values else sqrt(sum(value * value for value in values))
