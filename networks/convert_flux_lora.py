"""Writes a FLUX.1 LoRA of ai-toolkit in the layout of sd-scripts, or the other way round. Guide: docs/model_tools.md"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE]  # the packages in it would hide Python's own types and select
if os.path.dirname(HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(HERE))

from functools import partial

from library.model_tools.commands import convert_pair, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("convert_flux_lora")

if __name__ == "__main__":
    run_script(partial(convert_pair, family="flux"), GROUPS, description=str(__doc__))
