"""Which tensors of a whole model's file are the denoiser's, by their names alone. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from library.families.shared.unet import UNET
from library.families.shared.vae import VAE

# Before the names of other parts, in the single files of all families.
_OTHERS = (VAE, "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "control_model.")


def denoiser_keys(keys: Iterable[str]) -> set[str]:
    """The denoiser's tensors. Files of denoisers alone have no prefix, so there it is all that is of no other part."""
    keys = list(keys)
    prefixed = {key for key in keys if key.startswith(UNET)}
    return prefixed or {key for key in keys if not key.startswith(_OTHERS)}
