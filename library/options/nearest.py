"""The name that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """ "; did you mean 'x'?", or nothing where no known name is at least so like it, from 0 to 1, or begins it."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if not near:  # "euler_ancestral" for "euler_a"
        near = sorted((one for one in names if len(one) > 3 and name.startswith(one)), key=len)[-1:]
    return f"; did you mean {near[0]!r}?" if near else ""
