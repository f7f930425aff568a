"""Writes a network file in the layout of kohya, diffusers or ComfyUI. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.converting import GROUPS, convert_lora
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(convert_lora, GROUPS, description=str(__doc__))
