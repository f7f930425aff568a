"""Opens ONNX models for this process: on its GPU where ONNX Runtime can use one, else on its share of the processor."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import require_file
from library.errors import UserError
from library.preparation.common.images import processes
from library.runtime.packages import remedy

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider")  # on a GPU, best first
_ONLY_FATAL = 4  # severity in ONNX Runtime's log; what goes wrong is raised as well


def open_session(path: Path, hint: str | None = None) -> InferenceSession:
    """An `onnxruntime.InferenceSession`.

    Args:
        hint: what to do where the file is damaged.
    Raises: UserError: no such file, no ONNX model, or no ONNX Runtime.
    """
    require_file(path)
    # Its warnings are about missing GPU libraries, without which it runs on the CPU.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"ONNX Runtime is missing ({error}); {remedy('onnxruntime')}") from None

        onnxruntime.set_default_logger_severity(_ONLY_FATAL)
        ours, available = processes(), onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        if ours.world > 1:
            options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // ours.world)
        device = {"device_id": int(os.environ.get("LOCAL_RANK", "0"))}
        providers: list[Any] = [(name, device) for name in _PROVIDERS if name in available]
        if providers and hasattr(onnxruntime, "preload_dlls"):
            with contextlib.suppress(OSError, RuntimeError):
                onnxruntime.preload_dlls()  # the GPU libraries that came with torch
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an error class for every status, without a common one
            raise UserError(f"{path}: cannot be read as an ONNX model ({first_line(error)})", hint=hint) from None


def is_on_gpu(session: InferenceSession) -> bool:
    return session.get_providers()[0] in _PROVIDERS


def first_line(error: BaseException) -> str:
    """The part of an ONNX Runtime error that is useful to users."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
