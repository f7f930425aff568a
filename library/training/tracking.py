"""TensorBoard logs: losses, rates, gradient norm, pictures, and on request the settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from library.options.base import Options

# Never written to a log: secrets, and where things lie on this machine.
_NOT_LOGGED = ("wandb_api_key", "huggingface_token")


class Tracker:
    """Writes to `<logging_dir>/<log_prefix><date and time>/<tracker name>`; does nothing without --logging_dir."""

    def __init__(self, opts: Options, default_name: str, enabled: bool = True):
        self._writer = None
        options = opts.logging
        if options.logging_dir is None or not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        run = f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        self._writer = SummaryWriter(str(Path(options.logging_dir) / run / (options.log_tracker_name or default_name)))
        if options.log_config:
            rows = [f"| {name} | {value} |" for name, value in sorted(loggable(opts.flat()).items())]
            self._writer.add_text("config", "\n".join(["| option | value |", "|---|---|", *rows]), 0)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def loggable(values: dict[str, Any]) -> dict[str, Any]:
    """The options without secrets, and without folders and files that lie at an absolute path."""
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_LOGGED and value is not None and not Path(str(value)).is_absolute()
    }
