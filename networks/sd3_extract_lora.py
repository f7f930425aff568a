"""Makes a network file of the difference of two Stable Diffusion 3/3.5 models.

Guide: docs/model_tools.md
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import extract, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("sd3_extract_lora")

if __name__ == "__main__":
    run_script(extract, GROUPS, description=str(__doc__))
