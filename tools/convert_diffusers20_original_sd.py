"""Converts Stable Diffusion 1.x and 2.x between single files and Diffusers folders. Guide: docs/model_tools.md"""

import sys
from functools import partial
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.families.sd.converting import load_for_conversion
from library.model_tools.layouts import GROUPS, convert_model
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(partial(convert_model, load_for_conversion), GROUPS, description=str(__doc__))
