"""Cuts a DyLoRA file into networks of smaller ranks. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.dylora_cutting import GROUPS, cut_dylora
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(cut_dylora, GROUPS, description=str(__doc__))
