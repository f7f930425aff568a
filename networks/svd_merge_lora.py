"""Merges LoRA files of any ranks at a new rank. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import groups_of, svd_merge
from library.preparation.common.script import run_script

GROUPS = groups_of("svd_merge_lora")

if __name__ == "__main__":
    run_script(svd_merge, GROUPS, description=str(__doc__))
