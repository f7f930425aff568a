"""Shows which words a LoRA changes most. Guide: docs/model_tools.md"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.commands import groups_of, interrogate
from library.preparation.common.script import run_script

GROUPS = groups_of("lora_interrogator")

if __name__ == "__main__":
    run_script(interrogate, GROUPS, description=str(__doc__))
