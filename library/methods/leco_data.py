"""Batches of prompts: what a method that trains without images gives the loop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from library.data.sample.sampler import BatchLoader, make_loader
from library.methods.leco_pairs import PromptPair, read_pairs
from library.runtime.seeds import derive
from library.types import Batch, Size, TextCond

if TYPE_CHECKING:
    from library.data.types import ItemKey
    from library.options.base import Options
    from library.types import FamilyTraits

_STEP = 64  # pixels; sides that vary are multiples of it
_SHOWN = 16  # pairs that the log and the metadata name
_IN_METADATA = ("target", "positive", "unconditional", "neutral", "action", "multiplier", "weight")


@dataclass(frozen=True)
class PairBatch(Batch):
    """One pair of prompts, `pair.batch_size` times. `captions` and `text` are those of its target."""

    pair: PromptPair | None = None  # never None; fields with defaults come before it
    size: Size = Size(0, 0)  # noqa: RUF009  # of the images that are begun, in pixels
    positive: TextCond | None = None  # each (B, ...)
    neutral: TextCond | None = None
    unconditional: TextCond | None = None


class _Drawn(NamedTuple):
    """A pair with what is drawn for one batch."""

    pair: PromptPair
    size: Size
    original: Size  # what conditions on sizes say of the image
    corner: tuple[int, int]  # top, left of its part that is seen


class PromptData:
    """The pairs of --prompts_file. An epoch has one optimizer step for each pair, in an order of its own.

    With several processes or accumulated gradients it has each pair as often as a step has batches.
    """

    held_out = None
    num_train_images = num_reg_images = 0

    def __init__(self, opts: Options, traits: FamilyTraits, processes: int):
        self.opts, self.seed = opts, opts.training.seed
        self.file = Path(opts.method.prompts_file)
        self.pairs = read_pairs(self.file, traits, remarks=False)  # they are in the log already
        self.items = _Items(self.pairs, self.seed, opts.training.gradient_accumulation_steps * processes)
        self._encoded: Mapping[str, TextCond] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Over all processes."""
        return len(self.items)

    def plan(self, epoch: int) -> list[list[int]]:
        """The items of every batch of an epoch, one each, all processes together."""
        order = list(range(len(self.items)))
        Random(derive(self.seed, "plan", epoch)).shuffle(order)
        return [[item] for item in order]

    def loader(
        self, epoch: int, first_batch: int = 0, rank: int = 0, world: int = 1, workers: int | None = None
    ) -> BatchLoader:
        """See `TrainingData.loader`. There is nothing to load, so this process makes the batches."""
        accumulation = self.opts.training.gradient_accumulation_steps
        loader = make_loader(self, self._batch, rank, world, accumulation, 0, False)
        loader.batches.start(epoch, first_batch)
        return loader

    def set_total_steps(self, steps: int) -> None:
        """Nothing here depends on the length of the run."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts that occur, each once."""
        return tuple(dict.fromkeys(text for pair in self.pairs for text in pair.texts))

    def set_texts(self, encoded: Mapping[str, TextCond]) -> None:
        """Makes batches carry the conditioning of each of `texts`, which is for one item, on the CPU."""
        self._encoded = encoded

    def _batch(self, drawn: Sequence[_Drawn]) -> PairBatch:
        (one,) = drawn
        pair, count = one.pair, one.pair.batch_size

        def cond(text: str) -> TextCond:
            return self._encoded[text].map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

        return PairBatch(
            captions=[pair.target] * count,
            latents=None,
            pixels=None,
            loss_weights=torch.full((count,), float(pair.weight)),
            masks=None,
            original_sizes=torch.tensor([one.original] * count),
            crop_top_lefts=torch.tensor([one.corner] * count),
            target_sizes=torch.tensor([one.size] * count),
            text=cond(pair.target),
            network_multiplier=pair.multiplier,
            pair=pair,
            size=one.size,
            positive=cond(pair.positive),
            neutral=cond(pair.neutral),
            unconditional=cond(pair.unconditional),
        )

    # ---- for plans

    def batch_pixels(self) -> list[int]:
        """Pixels of each batch of an epoch, at the pairs' own sizes."""
        return [_pixels(pair) for pair in self.pairs] * self.items.repeats

    def largest_batch(self) -> PairBatch:
        """The batch with the most pixels."""
        pair = max(self.pairs, key=_pixels)
        return self._batch([_Drawn(pair, pair.size, pair.size, (0, 0))])

    # ---- what is said of it

    def sizes(self) -> dict[Size, str]:
        return {pair.size: f"{self.file}: a resolution of" for pair in self.pairs}

    def batch_sizes(self) -> list[int]:
        return sorted({pair.batch_size for pair in self.pairs})

    def batch_shapes(self) -> set[tuple[int, Size]]:
        return {(pair.batch_size, pair.size) for pair in self.pairs}

    def example(self) -> tuple[str, Size]:
        return self.pairs[0].target, self.pairs[0].size

    def findings(self) -> list[tuple[str, list[tuple[Path, str]]]]:
        return []

    def content(self) -> list[str]:
        return sorted(json.dumps(asdict(pair)) for pair in self.pairs)

    def report(self) -> list[str]:
        """Lines for the log: the pairs, so that a slider's expansion can be seen."""
        count = len(self.pairs)
        lines = [f"{self.file}: {count} pair{'' if count == 1 else 's'} of prompts"]
        lines += [f"  {pair}" for pair in self.pairs[:_SHOWN]]
        return [*lines, f"  and {count - _SHOWN} more"] if count > _SHOWN else lines

    def metadata(self, processes: int = 1) -> dict[str, Any]:
        shown = [{name: getattr(pair, name) for name in _IN_METADATA} for pair in self.pairs[:_SHOWN]]
        return {
            "ss_leco_prompt_count": len(self.pairs),
            "ss_leco_prompts_file": self.file.name,
            "ss_leco_preview": json.dumps(shown, ensure_ascii=False),
        }


def _pixels(pair: PromptPair) -> int:
    return pair.batch_size * pair.size.width * pair.size.height


class _Items:
    """Every pair as often as an optimizer step has batches."""

    def __init__(self, pairs: Sequence[PromptPair], seed: int, repeats: int):
        self.pairs, self.seed, self.repeats = pairs, seed, repeats

    def __len__(self) -> int:
        return len(self.pairs) * self.repeats

    def __getitem__(self, key: ItemKey) -> _Drawn:
        pair = self.pairs[key.index % len(self.pairs)]
        rng = Random(derive(self.seed, "size", key.epoch, key.index))
        size = drawn_size(pair, rng)
        if not pair.dynamic_crops:
            return _Drawn(pair, size, size, (0, 0))
        factor = 1 + 2 * rng.random()
        original = Size(int(size.width * factor), int(size.height * factor))
        corner = rng.randint(0, original.height - size.height), rng.randint(0, original.width - size.width)
        return _Drawn(pair, size, original, corner)


def drawn_size(pair: PromptPair, rng: Random) -> Size:
    """The size of a batch's images: the pair's, or sides that are multiples of 64 between half of it and all of it."""
    side = pair.size.width
    if not pair.dynamic_resolution or side != pair.size.height:
        return pair.size
    choices = range(-(-side // 2 // _STEP) * _STEP, side + 1, _STEP)
    choices = [choice for choice in choices if choice] or [side]
    return Size(rng.choice(choices), rng.choice(choices))
