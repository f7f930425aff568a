"""Merges LoRA files of any ranks at a new rank. Guide: docs/model_tools.md"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE]  # the packages in it would hide Python's own types and select
if os.path.dirname(HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(HERE))

from library.model_tools.commands import groups_of, svd_merge
from library.preparation.common.script import run_script

GROUPS = groups_of("svd_merge_lora")

if __name__ == "__main__":
    run_script(svd_merge, GROUPS, description=str(__doc__))
