"""Makes a network file of the difference of two Stable Diffusion 1.x, 2.x or SDXL models.

Guide: docs/model_tools.md
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE]  # the packages in it would hide Python's own types and select
if os.path.dirname(HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(HERE))

from library.model_tools.commands import extract, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("extract_lora_from_models")

if __name__ == "__main__":
    run_script(extract, GROUPS, description=str(__doc__))
