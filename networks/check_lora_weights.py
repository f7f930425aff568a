"""Shows the layers of a network file, and what is wrong with its values. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import check_weights, groups_of
from library.preparation.common.script import run_script

GROUPS = groups_of("check_lora_weights")

if __name__ == "__main__":
    run_script(check_weights, GROUPS, description=str(__doc__))
