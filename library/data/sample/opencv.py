"""OpenCV, which a machine may have and yet be unable to load: its usual build needs libraries of a desktop."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from library.errors import UserError
from library.runtime.packages import pip

WITH_WINDOWS, HEADLESS = "opencv-python", "opencv-python-headless"


@cache
def opencv() -> ModuleType:
    """The module cv2, on one thread. Scripts that will need it call this first, before anything large is read.

    Raises: UserError: it cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        from importlib import metadata  # here, as it imports many modules that are seldom needed

        reason = (str(error).splitlines() or [type(error).__name__])[0]
        try:  # the build that needs no desktop, of the version that is installed
            build = f"{HEADLESS}=={metadata.version(WITH_WINDOWS)}"
        except metadata.PackageNotFoundError:
            build = HEADLESS
        command = pip("install", "--force-reinstall", "--no-deps", build)
        raise UserError(f"OpenCV cannot be imported ({reason}); run: {command}") from None
    # Its thread pool does not survive a fork, and in many data workers at once it only fights over the cores.
    cv2.setNumThreads(0)
    return cv2
