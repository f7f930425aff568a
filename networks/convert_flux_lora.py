"""Writes a FLUX.1 LoRA of ai-toolkit in the layout of sd-scripts, or the other way round. Guide: docs/model_tools.md"""

import sys
from functools import partial
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.converting import PAIR_GROUPS as GROUPS
from library.model_tools.converting import convert_pair
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(partial(convert_pair, family="flux"), GROUPS, description=str(__doc__))
