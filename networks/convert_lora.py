"""Writes a network file in the layout of kohya, diffusers or ComfyUI. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import convert, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("convert_lora")

if __name__ == "__main__":
    run_script(convert, GROUPS, description=str(__doc__))
