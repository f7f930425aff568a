"""--notify: one message when a run is done, was stopped, or has failed, with its last sample image."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.logging import notify_urls
from library.runtime.logs import LOGGER
from library.screen import counted, without_secrets
from library.training.tracking import Ending, Sink, ending_by

if TYPE_CHECKING:
    from PIL import Image

    from library.options.base import Options


class Notifier(Sink):
    """As a context manager around a run it sends the message; as a sink of the tracker it learns what to say.

    A message that cannot be sent is a warning. Args: enabled: false in all processes of a run but the first.
    """

    def __init__(self, opts: Options, enabled: bool = True):
        self._urls = notify_urls(opts) if enabled else []
        self._name = Path(opts.saving.output_name or "last").name
        self._started = time.time()
        self._step = 0
        self._loss: float | None = None
        self._image: Path | None = None
        self._file: Path | None = None
        self._ending: Ending | None = None

    # ---- as a sink

    def sinks(self) -> dict[str, Sink]:
        """Itself, by its name in messages, where there is a URL."""
        return {"--notify": self} if self._urls else {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step = max(self._step, step)
        self._loss = values.get("loss/average", self._loss)

    def image(self, step: int, name: str, image: Image.Image, caption: str, path: Path) -> None:
        self._image = path

    def saved(self, step: int, path: Path) -> None:
        if not path.name.endswith("-state"):
            self._file = path

    def ended(self, ending: Ending) -> None:
        self._ending = ending

    # ---- around a run

    def __enter__(self) -> Notifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        ending = self._ending if error is None else ending_by(error)
        if self._urls and ending is not None:
            self._send(ending)

    def _send(self, ending: Ending) -> None:
        title = f"{self._name}: {ending.kind}"
        body = without_secrets("\n".join(self._lines(ending)))
        attached = str(self._image) if self._image is not None and self._image.is_file() else None
        for number, url in enumerate(self._urls, 1):
            if not (_sent(url, title, body, attached) or (attached and _sent(url, title, body, None))):
                LOGGER.warning("--notify: the message to URL %d of %d could not be sent", number, len(self._urls))

    def _lines(self, ending: Ending) -> list[str]:
        hours, rest = divmod(int(time.time() - self._started), 3600)
        lines = [ending.text] if ending.text else []
        lines.append(f"{counted(self._step, 'step')} in {hours}:{rest // 60:02d}:{rest % 60:02d}")
        if self._loss is not None:
            lines.append(f"average loss {self._loss:.4f}")
        if self._file is not None:
            lines.append(f"saved last: {self._file}")
        return lines


def _sent(url: str, title: str, body: str, attached: str | None) -> bool:
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it may name URLs
    try:
        service = apprise.Apprise()
        return bool(service.add(url) and service.notify(body=body, title=title, attach=attached))
    except Exception as error:  # whatever it is, it is no reason to fail
        LOGGER.debug("--notify: %s", type(error).__name__)
        return False
