"""What a model says about how it was trained: marker tensors in checkpoints, the scheduler in Diffusers folders.

Checkpoints that predict v hold an empty tensor `v_pred`, and `ztsnr` where their noise ends in pure noise; user
interfaces look for them. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.reading import read_names
from library.errors import UserError
from library.families.shared.recognition import read_json
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from library.options.base import Options

V_PRED, ZTSNR = "v_pred", "ztsnr"
MARKERS = {V_PRED: "v_parameterization", ZTSNR: "zero_terminal_snr"}  # and the options that say the same
EDM = ("edm_mean", "edm_vpred.sigma_max")  # of another noise schedule, which is not available
EDM_FOUND = "edm"  # any of them


def follow(opts: Options) -> Options:
    """The options, completed by the markers of the model; the log says so.

    An option that is given stays as it is: then the log warns. Models that cannot be read say nothing here.
    """
    name = opts.model.pretrained_model_name_or_path
    try:
        found, where = stated(Path(name or ""))
    except (UserError, OSError):
        return opts
    if EDM_FOUND in found:
        LOGGER.warning("%s: was trained with an EDM noise schedule, which is not available: trained without it", name)
    groups = {V_PRED: opts.family, ZTSNR: opts.noise}
    silent = [marker for marker in MARKERS if marker in found and not getattr(groups[marker], MARKERS[marker])]
    against = ""  # what of the options contradicts the markers
    off = [MARKERS[marker] for marker in silent if MARKERS[marker] in opts.explicit]
    if off:
        against = f"{off[0]} is off in {opts.origin(off[0])}"
    elif V_PRED in silent and opts.loss.v_pred_like_loss is not None:
        against = "--v_pred_like_loss is for models that predict noise"
    if against:
        LOGGER.warning("%s: %s, but %s; it is trained as the options say", name, _words(found, where), against)
    elif silent:
        flags = " ".join(f"--{MARKERS[marker]}" for marker in silent)
        LOGGER.info("%s: switched on, as %s: %s", flags, name, _words(found, where))
        return opts.replaced(**{MARKERS[marker]: True for marker in silent})
    return opts


def stated(path: Path) -> tuple[set[str], str]:
    """The markers of a file or folder, and where it has them. Raises: UserError, OSError: it cannot be read."""
    if path.is_dir():
        config = path / "scheduler" / "scheduler_config.json"
        scheduler = read_json(config) if config.is_file() else {}
        if scheduler.get("prediction_type") != "v_prediction":
            return set(), ""
        return {V_PRED, ZTSNR} if scheduler.get("rescale_betas_zero_snr") is True else {V_PRED}, "its scheduler says"
    names = (read_names(path) or {}) if path.is_file() else {}
    found = {marker for marker in MARKERS if marker in names}
    return found | ({EDM_FOUND} if any(key in names for key in EDM) else set()), "its markers say"


def _words(found: Collection[str], where: str) -> str:
    ending = ", with noise that ends in pure noise" if ZTSNR in found else ""
    return f"{where} that it predicts v{ending}" if V_PRED in found else f"{where} that its noise ends in pure noise"


def without_markers(keys: Iterable[str], facts: Mapping[str, bool | None]) -> list[str]:
    """The keys of a file without markers of what is no longer so.

    Args:
        facts: by markers, whether they are true of the model; None, as not being there: as its file says.
    """
    return [key for key in keys if facts.get(key) is not False]
