"""What a safetensors file says about itself, on the screen: tools/show_metadata.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from library.checkpoints.reading import file_format, read_header
from library.errors import UserError
from library.options.base import Options
from library.options.image_tools import ShowMetadataOptions
from library.options.preparation import WorkOptions
from library.runtime.logs import LOGGER
from library.screen import UNSEEN

GROUPS = (ShowMetadataOptions, WorkOptions)


def show_metadata(opts: Options) -> None:
    """Prints the metadata of --model as JSON, whole: it is what the script is for, however long a value is.

    Raises: UserError: it is no weight file, or one without metadata.
    """
    if file_format(opts.shown.model) != "safetensors":
        raise UserError(f"{opts.shown.model}: this is a torch file; only safetensors files have metadata")
    metadata, _ = read_header(opts.shown.model)
    if not metadata:
        LOGGER.warning("%s has no metadata", opts.shown.model)
    print(as_json(metadata, sys.stdout.encoding))


def as_json(metadata: Mapping[str, str], encoding: str) -> str:
    """Sorted by key, indented by 4. Values that hold JSON stay the texts that they are in the file.

    Args:
        encoding: that of the place it goes to; JSON's escapes (as in \\u3042) are used where it lacks a sign.
    """
    text = json.dumps(metadata, indent=4, sort_keys=True, ensure_ascii=False)
    # JSON escapes most of the characters that a terminal obeys; the others get its escape too.
    text = UNSEEN.sub(lambda one: one[0] if one[0] == "\n" else f"\\u{ord(one[0]):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(metadata, indent=4, sort_keys=True)
    return text
