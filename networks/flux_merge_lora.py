"""Merges networks into FLUX.1, CLIP-L and T5, or into one network. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import groups_of, merge
from library.preparation.common.script import run_script

GROUPS = groups_of("flux_merge_lora")

if __name__ == "__main__":
    run_script(merge, GROUPS, description=str(__doc__))
