"""Writes a FLUX.1 LoRA of ai-toolkit in the layout of sd-scripts, or the other way round. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from functools import partial

from library.model_tools.commands import convert_pair, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("convert_flux_lora")

if __name__ == "__main__":
    run_script(partial(convert_pair, family="flux"), GROUPS, description=str(__doc__))
