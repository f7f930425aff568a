"""Console messages, and silence for third-party noise that a user cannot act on."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from library.errors import UserError
from library.runtime.files import reason
from library.runtime.limits import as_user_error
from library.screen import shown

if TYPE_CHECKING:
    from tqdm import tqdm

LOGGER = logging.getLogger("trainscripts")

# Libraries that report what is merely absent (kernels, optional packages), at import and later.
_NOISY_LOGGERS = ("xformers", "transformers", "diffusers", "bitsandbytes", "torch.distributed", "torchao", "accelerate")


def setup_logging(level: str | None = None, file: str | None = None, simple: bool = False) -> None:
    """Sends our messages to stderr, or to `file` where one is given; `simple` leaves out time and level.

    Raises: UserError: the file cannot be written.
    """
    handler = _IntoFile.opened(file) if file else _BesideBars(sys.stderr)
    layout = "%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(_Shown(layout, datefmt="%H:%M:%S"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level or "INFO")
    LOGGER.propagate = False


class _Shown(logging.Formatter):
    """Every message is one line, as a screen may show it; a traceback behind it stays as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)


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

    @classmethod
    def opened(cls, file: str) -> _IntoFile:
        """Raises: UserError: the file cannot be written."""
        try:
            if os.path.exists(file) and stat.S_ISFIFO(os.stat(file).st_mode):
                os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))  # fails where it would wait for a reader
            return cls(file, encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise UserError(f"--console_log_file: cannot write {file} ({why})") from None

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
        why = reason(error)
        LOGGER.warning("--console_log_file: %s cannot be written (%s); messages come here", self.baseFilename, why)
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


@cache
def _bar_class() -> type[tqdm]:
    """A class of tqdm's, made once, since each has a thread of its own."""
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            """The unit as it is read: 2.50 steps/s, but 1.50s/step where one takes more than a second."""
            found = super().format_dict
            rate = found["rate"] or (found["n"] - found["initial"]) / (found["elapsed"] or 1)
            if found["unit"] != "B":
                found["unit"] = f" {found['unit']}" if rate >= 1 else found["unit"].removesuffix("s")
            return found

    return Bar


def progress(total: int | None, desc: str, unit: str = "it", **kwargs: Any) -> tqdm:
    """A tqdm bar on stderr with rate and remaining time; a line now and then where stderr is no terminal.

    Args: unit: what is counted, in the plural, or "B" for bytes.
    """
    interval = 0.5 if sys.stderr.isatty() else 10.0
    how = {"mininterval": interval, "dynamic_ncols": True, "smoothing": 0.1, "file": _Screen(sys.stderr), **kwargs}
    return _bar_class()(total=total, desc=desc, unit=unit, **how)


def clear_progress() -> None:
    """Wipes open bars off the screen, so that what is printed next takes their place. An update shows them again."""
    for bar in _open_bars():
        bar.clear()


def end_progress() -> None:
    """Ends the lines of bars that are still open, so that what is printed next begins a line of its own."""
    for bar in _open_bars():
        bar.close()


def fail(error: UserError) -> NoReturn:
    """Ends a script whose user has something to correct: a line on the screen for each problem, and status 2."""
    end_progress()
    print(error.render(), file=sys.stderr)
    raise SystemExit(2) from None


def fail_for_the_machine(error: Exception) -> NoReturn:
    """Ends a script by an unexpected exception: in one line where the machine caused it.

    Its traceback is in the log then, with --console_log_level=DEBUG. Any other exception passes, as it may be a fault
    of the code.
    """
    problem = as_user_error(error)
    if problem is None:
        raise error
    LOGGER.debug("where it was raised:", exc_info=error)
    fail(problem)


def _open_bars() -> list[Any]:
    tqdm = sys.modules.get("tqdm")
    return list(getattr(tqdm.tqdm, "_instances", ())) if tqdm is not None else []
