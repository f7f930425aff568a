"""Weighted captions: `(words)` counts 1.1 times, `(words:1.3)` 1.3 times, `[words]` 1/1.1 times, and they nest.

A backslash before a bracket or another backslash makes it an ordinary character. A bracket that is never closed
reaches to the end of the caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from library.text.chunking import CHUNK, chunk_ids, content_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

STEP = 1.1
Evening = Literal["original", "abs", "none"]  # how weighted states are scaled, see `weighted`

TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)


def parse_emphasis(caption: str) -> list[tuple[str, float]]:
    """A caption as runs of text with their weights; neighbours of one weight are one run.

    >>> parse_emphasis("a (red:1.5) [house]")
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('house', 0.9090909090909091)]
    """
    runs: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # bracket, and the number of runs before it

    def scale(since: int, factor: float) -> None:
        runs[since:] = [(text, weight * factor) for text, weight in runs[since:]]

    for match in TOKEN.finditer(caption):
        kind, text = match.lastgroup, match.group()
        if kind == "open":
            opened.append((text, len(runs)))
        elif kind == "weight" and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(match["weight"]))
        elif kind == "close" and opened and opened[-1][0] == ("(" if text == ")" else "["):
            scale(opened.pop()[1], STEP if text == ")" else 1 / STEP)
        else:
            runs.append((match["escaped"] or text, 1.0))
    for bracket, since in reversed(opened):
        scale(since, STEP if bracket == "(" else 1 / STEP)
    merged: list[tuple[str, float]] = []
    for text, weight in runs:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def tokenize_weighted(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_token_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids of weighted captions, and the weight of every position of the encoded sequence.

    Runs are tokenised one by one. BOS, EOS and padding weigh 1.

    Args:
        tokenizer: a CLIPTokenizer.
        captions: B texts.
        max_token_length: content tokens, 75 (the same as None), 150 or 225.
    Returns: ids (B, n, 77) int64 and weights (B, n * 75 + 2) float32, n = max_token_length / 75.
    """
    import torch

    length = max_token_length or CHUNK
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ids, weights = [], []
    for caption in captions:
        content: list[int] = []
        strengths: list[float] = []
        for text, weight in parse_emphasis(caption):
            run = content_ids(tokenizer, text, length)
            content += run
            strengths += [weight] * len(run)
        content, strengths = content[:length], strengths[:length]
        ids.append(chunk_ids(content, length, **special))
        weights.append([1.0, *strengths] + [1.0] * (length - len(strengths) + 1))
    return torch.tensor(ids), torch.tensor(weights)


def weighted(states: Tensor, weights: Tensor, evening: Evening = "none") -> Tensor:
    """The states of texts times the weights of their positions.

    Args:
        states: (B, n, width).
        weights: (B, n).
        evening: "original" scales each text to the mean that its states had before, "abs" to the mean of their absolute
            values, and "none" leaves them.
    """
    result = states * weights[:, :, None].to(states)
    if evening == "none":
        return result
    before, after = states.float(), result.float()
    if evening == "abs":
        before, after = before.abs(), after.abs()
    factor = before.mean(dim=(1, 2), keepdim=True) / after.mean(dim=(1, 2), keepdim=True)
    return result * factor.to(result)
