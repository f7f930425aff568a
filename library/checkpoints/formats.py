"""Which format a weight file has, by its first bytes, as names of downloads and of caches say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.runtime.files import open_regular

Format = Literal["safetensors", "torch"]

LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, or a pickle's protocol
_ENOUGH = 256  # bytes that identify a format

# What else people give by mistake: first bytes -> what it is, and what to do.
_OTHERS = (
    (b"GGUF", "this is a GGUF file, and GGUF is not supported; use the .safetensors version of this model"),
    (b"version https://git-lfs", "this is a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"<", "this is a web page, not a weight file; download the file itself"),
    (b"\x89HDF", "this is an HDF5 (Keras) file, which is not supported; use the .safetensors version of this model"),
    (b"7z\xbc\xaf", "this is a 7z archive; unpack it first"),
    (b"Rar!", "this is a RAR archive; unpack it first"),
)


def weight_format(path: str | Path) -> Format:
    """The format of an existing file.

    Raises: UserError: it is no weight file, or one of a format that cannot be read; the message names what it is.
    """
    path = Path(path)
    with open_regular(path) as file:
        start = file.read(_ENOUGH)
    # A length of 8 bytes, then a JSON object. Looked for first: a header may be as long as a pickle's first bytes.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER:
        return "safetensors"
    if start.startswith(_TORCH_STARTS):
        return "torch"
    what = next((text for sign, text in _OTHERS if start.lstrip().startswith(sign)), None)
    if start.lstrip().startswith(b"{"):
        what = "this is a JSON file, not a weight file; of a Diffusers model, give the folder"
        if path.name.endswith(".index.json"):
            what = (
                "this is the index of weights that are cut into several files; give the Diffusers folder of the model"
            )
        elif path.name == "model_index.json":
            what = f"this is the index of a Diffusers model; give its folder, {path.parent}"
    elif what is None:
        size = path.stat().st_size
        what = f"cannot be read: neither a safetensors file nor a torch checkpoint ({size:,} bytes); get the file again"
    raise UserError(f"{path}: {what}")
