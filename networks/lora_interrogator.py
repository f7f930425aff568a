"""Shows which words a LoRA changes most. Guide: docs/model_tools.md"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE]  # the packages in it would hide Python's own types and select
if os.path.dirname(HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(HERE))

from library.model_tools.commands import groups_of, interrogate
from library.preparation.common.script import run_script

GROUPS = groups_of("lora_interrogator")

if __name__ == "__main__":
    run_script(interrogate, GROUPS, description=str(__doc__))
