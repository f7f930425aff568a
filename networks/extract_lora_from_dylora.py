"""Cuts a DyLoRA file into networks of smaller ranks. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import cut_dylora, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("extract_lora_from_dylora")

if __name__ == "__main__":
    run_script(cut_dylora, GROUPS, description=str(__doc__))
