"""Where the numbers and images of a run go: TensorBoard, Weights & Biases, and other sinks.

Each has a thread of its own. One that fails is left out from then on, one that is slow loses values; training goes
ahead in both cases.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from library.options.logging import holds_absolute_path, read_tracker_config, secrets
from library.runtime.logs import LOGGER
from library.screen import shown

if TYPE_CHECKING:
    from PIL import Image

    from library.options.base import Options

PACE, MEMORY = "time/step", "memory/peak GB"  # names under which numbers are logged: seconds, 10^9 bytes

_MOST_WAITING = 1000  # values and images that a slow tracker may be behind
_PATIENCE = 60.0  # seconds that the end of a run waits for a tracker


class Ending(NamedTuple):
    """How a run has ended."""

    kind: Literal["done", "stopped", "failed"]
    text: str  # in a few words or one line; no secrets


class Sink:
    """One tracker. Any method may raise or take long; a tracker leaves out what it has no use for."""

    def open(self) -> None:
        """Called first, in the thread in which all else is called."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` optimizer steps, by the names under which they are logged."""

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        """A sample image; `name` is "sample/" and the number of its prompt, `path` its file."""

    def saved(self, step: int, path: Path) -> None:
        """A file or folder has been saved."""

    def flush(self) -> None:
        """What belongs together has arrived: the sample images of one occasion."""

    def ended(self, ending: Ending) -> None:
        """Nothing more comes."""

    def close(self, failed: bool) -> None:
        """Called last."""


class Tracker:
    """Hands everything on to the sinks. As a context manager it closes them, also when the run fails."""

    def __init__(self, sinks: Mapping[str, Sink], patience: float = _PATIENCE, most_waiting: int = _MOST_WAITING):
        self._threads = [_SinkThread(name, sink, most_waiting) for name, sink in sinks.items()]
        self._patience = patience

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for thread in self._threads:
            thread.put(lambda sink: sink.scalars(step, values))

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        for thread in self._threads:
            thread.put(lambda sink: sink.image(step, name, image, caption, path))

    def saved(self, step: int, path: Path) -> None:
        for thread in self._threads:
            thread.put(lambda sink: sink.saved(step, path))

    def flush(self) -> None:
        for thread in self._threads:
            thread.put(lambda sink: sink.flush())

    def ended(self, ending: Ending) -> None:
        for thread in self._threads:
            thread.put(lambda sink: sink.ended(ending))

    def close(self, failed: bool = False) -> None:
        """Waits until everything has arrived, but not forever."""
        end = time.monotonic() + self._patience
        for thread in self._threads:
            thread.close(failed, end)
        self._threads = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            self.ended(ending_by(error))
        self.close(failed=kind is not None)


def ending_by(error: BaseException) -> Ending:
    """The ending of a run that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        return Ending("stopped", "at once; what was saved before is whole")
    return Ending("failed", shown(_reason(error)))


class _SinkThread:
    def __init__(self, name: str, sink: Sink, most_waiting: int):
        self._name, self._sink = name, sink
        self._waiting: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(most_waiting)
        self._failed = self._warned_slow = False
        # A daemon: the interpreter does not wait for one that hangs.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Sink], None]) -> None:
        if self._failed:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            if not self._warned_slow:
                LOGGER.warning("%s is too slow; some values of this run are not logged there", self._name)
            self._warned_slow = True

    def close(self, failed: bool, end: float) -> None:
        """`end` in seconds of `time.monotonic`."""
        try:
            for call in (lambda sink: sink.close(failed), None):
                self._waiting.put(call, timeout=max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            LOGGER.warning("%s did not end in time; what was logged last may be missing there", self._name)

    def _work(self) -> None:
        self._try(lambda sink: sink.open())
        while (call := self._waiting.get()) is not None:
            if not self._failed:
                self._try(call)

    def _try(self, call: Callable[[Sink], None]) -> None:
        try:
            call(self._sink)
        except Exception as error:  # whatever it is, it is no reason to stop training
            self._failed = True
            LOGGER.warning("%s failed, nothing more is logged there: %s", self._name, _reason(error))


def make_tracker(
    opts: Options, default_name: str, enabled: bool = True, others: Mapping[str, Sink] | None = None
) -> Tracker:
    """The trackers that the options ask for; a tracker that cannot be opened is warned about and left out.

    Args: others: further sinks, by their names in messages.
    """
    options = opts.logging
    names = options.trackers if enabled else ()
    settings = read_tracker_config(options.log_tracker_config) if options.log_tracker_config and names else {}
    sinks: dict[str, Sink] = dict(others or {}) if enabled else {}
    for name in names:
        kind, title = (TensorBoard, "TensorBoard") if name == "tensorboard" else (WeightsAndBiases, "Weights & Biases")
        try:
            sinks[title] = kind(opts, options.log_tracker_name or default_name, settings.get(name, {}))
        except Exception as error:
            LOGGER.warning("%s cannot be used, the run continues without it: %s", title, _reason(error))
    return Tracker(sinks)


class TensorBoard(Sink):
    """Writes to `<logging_dir>/<log_prefix><date and time>-<output_name>/<name>`; `settings` go to SummaryWriter."""

    def __init__(self, opts: Options, name: str, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        options = opts.logging
        run = options.folder_of_run(time.strftime("%Y%m%d%H%M%S"), opts.saving.output_name)
        _quiet_writer_threads()
        self._writer = SummaryWriter(str(run / name), **settings)
        if options.log_config:
            rows = [f"| {name} | {value} |" for name, value in sorted(loggable(opts).items())]
            self._writer.add_text("config", "\n".join(["| option | value |", "|---|---|", *rows]), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        import numpy as np

        self._writer.add_image(f"{name} {caption[:60]}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


def _quiet_writer_threads() -> None:
    """Keeps the tracebacks of TensorBoard's own threads off the screen: they pass their errors on to whoever writes."""
    before = threading.excepthook
    if getattr(before, "quiet_writers", False):
        return

    def hook(failed: threading.ExceptHookArgs) -> None:
        module = type(failed.thread).__module__
        if module.split(".")[0] == "tensorboard" and isinstance(failed.exc_value, OSError):
            LOGGER.debug("%s ended: %s", failed.thread.name, failed.exc_value)
        else:
            before(failed)

    hook.quiet_writers = True
    threading.excepthook = hook


class WeightsAndBiases(Sink):
    """Logs to a run of its own in the project `name`; `settings` go to wandb.init.

    Its files lie in `<logging_dir>/wandb`, or in ./wandb. Values are drawn over "step", which, unlike wandb's own
    counter, may also go back: losses arrive a little later than what is measured between the steps.
    """

    def __init__(self, opts: Options, name: str, settings: Mapping[str, Any]):
        import wandb

        options = opts.logging
        if options.wandb_api_key:
            os.environ["WANDB_API_KEY"] = options.wandb_api_key  # wandb.login would store it on the disk
        if options.logging_dir:
            Path(options.logging_dir).mkdir(parents=True, exist_ok=True)
        run_name = options.wandb_run_name or opts.saving.output_name
        chosen = {"project": name, "name": run_name, "dir": options.logging_dir, **settings}
        limits = {"finish_timeout": 0.8 * _PATIENCE} if "finish_timeout" in wandb.Settings.model_fields else {}
        chosen["settings"] = {**limits, **chosen.get("settings", {})}
        if options.log_config:
            chosen["config"] = {**loggable(opts), **chosen.get("config", {})}
        before, masked = sys.argv, list(sys.argv)
        for value in secrets(opts).values():
            masked = [argument.replace(value, "***") for argument in masked]
        sys.argv = masked  # wandb stores it
        try:
            self._run = wandb.init(**chosen)
        finally:
            sys.argv = before
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(image, caption=caption or None)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def loggable(opts: Options) -> dict[str, Any]:
    """The options that have a value, without secrets, folders and absolute paths."""
    hidden = secrets(opts)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in opts.flat().items()
        if value is not None and name not in hidden and not name.endswith("_dir") and not holds_absolute_path(value)
    }


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
