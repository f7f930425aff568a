"""Console messages, and silence for third-party noise that a user cannot act on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

from library.errors import UserError

LOGGER = logging.getLogger("trainscripts")

# Libraries that report what is merely absent (kernels, optional packages), at import and later.
_NOISY_LOGGERS = ("xformers", "transformers", "diffusers", "bitsandbytes", "torch.distributed", "torchao", "accelerate")


def setup_logging(level: str | None = None, file: str | None = None, simple: bool = False) -> None:
    """Sends our messages to stderr, or to `file` where one is given; `simple` leaves out time and level.

    Raises: UserError: the file cannot be opened.
    """
    try:
        handler = _IntoFile(file) if file else _BesideBars(sys.stderr)
    except OSError as error:
        raise UserError(f"--console_log_file: cannot write {file}: {error.strerror or error}") from None
    layout = "%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(layout, datefmt="%H:%M:%S"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level or "INFO")
    LOGGER.propagate = False


class _BesideBars(logging.StreamHandler):
    """A handler whose messages do not stand behind a progress bar. What the screen does not take is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        clear_progress()
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _IntoFile(logging.FileHandler):
    """A handler for a file; when that can no longer be written, one warning says so, and the screen has the rest."""

    def __init__(self, file: str):
        super().__init__(file, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        screen = _BesideBars(sys.stderr)
        screen.setFormatter(self.formatter)
        LOGGER.handlers[:] = [screen if handler is self else handler for handler in LOGGER.handlers]
        with contextlib.suppress(OSError):
            self.close()  # tries once more to write what is left
        reason = error.strerror or error
        LOGGER.warning("--console_log_file: %s cannot be written (%s); messages come here", self.baseFilename, reason)
        screen.handle(record)


class _Screen:
    """stderr for bars, which must not end a run when it is a file on a full disk, or a program that is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_third_parties() -> None:
    """Keeps warnings off the screen that are about the installation of optional parts. Call before heavy imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("XFORMERS_MORE_DETAILS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ACCELERATE_DISABLE_RICH", "1")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|xformers|bitsandbytes|diffusers)\b")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def progress(total: int | None, desc: str, unit: str = "it", **kwargs: Any) -> Any:
    """A tqdm bar on stderr with rate and remaining time; a line now and then where stderr is no terminal."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    how = {"mininterval": interval, "dynamic_ncols": True, "smoothing": 0.1, "file": _Screen(sys.stderr), **kwargs}
    return tqdm(total=total, desc=desc, unit=unit, **how)


def clear_progress() -> None:
    """Wipes open bars off the screen, so that what is printed next takes their place. They come back as they go on."""
    for bar in _open_bars():
        bar.clear()


def end_progress() -> None:
    """Ends the lines of bars that are still open, so that what is printed next begins a line of its own."""
    for bar in _open_bars():
        bar.close()


def _open_bars() -> list[Any]:
    tqdm = sys.modules.get("tqdm")
    return list(getattr(tqdm.tqdm, "_instances", ())) if tqdm is not None else []
