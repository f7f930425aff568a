"""Nucleus sampling of captions, with a random stream for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.runtime.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

LIKELIEST = 50  # tokens that are sampled from at most; the default of transformers when the first captioners came out


class NucleusSampling:
    """A logits processor for greedy search that makes the best score a sample from the nucleus.

    transformers would draw for the whole batch from torch's global generator, so that a caption depended on the
    images before and beside it. Here Gumbel noise from an image's own stream is added to the scores, and greedy
    search takes the best: the same distribution, independent of the batch.

    Args:
        top_p: in (0, 1]; tokens are sampled from the likeliest ones that together have at least this probability.
        seed: of the run.
        names: what identifies each image, in the order of the batch.
    """

    def __init__(self, top_p: float, seed: int, names: Sequence[str]):
        self.top_p = top_p
        # On the CPU, so that the captions are the same on every device.
        self.streams = [generator("cpu", seed, "caption", name) for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, words) scores of the next word to scores with noise; -inf outside the nucleus."""
        import torch

        kept = nucleus(scores.float(), self.top_p)
        uniform = torch.stack([torch.rand(kept.shape[-1], generator=stream) for stream in self.streams])
        # Away from 0 and 1, where the noise has no finite value.
        uniform = uniform.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)
        return kept - torch.log(-torch.log(uniform)).to(kept.device)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """(B, words) scores, with -inf for all but the likeliest words: at most `LIKELIEST`, of which the fewest that
    together have at least the probability `top_p` among them."""
    import torch

    best, places = scores.topk(min(LIKELIEST, scores.shape[-1]), dim=-1)
    chances = best.softmax(-1)
    before = chances.cumsum(-1) - chances  # what the likelier ones have together
    best = best.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(-1, places, best)
