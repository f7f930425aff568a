"""Verifies a network file: what it is, whether it is sound, how much it changes, who reads it.

Exit status: 0 usable, 1 usable with warnings, 2 not usable. Guide: docs/model_tools.md
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.model_tools.verification_output import GROUPS, verify_file
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(verify_file, GROUPS, description=str(__doc__))
