"""Converts FLUX.1's transformer from Diffusers' layout to the original single file. Guide: docs/model_tools.md"""

import sys
from functools import partial
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.families.flux.converting import DENOISER_FOLDER, original_entries
from library.model_tools.original_layout import GROUPS, convert
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(partial(convert, original_entries, DENOISER_FOLDER), GROUPS, description=str(__doc__))
