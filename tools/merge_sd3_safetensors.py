"""Puts the parts of a Stable Diffusion 3 or 3.5 model into one file. Guide: docs/model_tools.md"""

import sys
from functools import partial
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from library.families.sd3.bundling import PREFIXES, bundle_entries
from library.model_tools.bundling import GROUPS, bundle
from library.preparation.common.script import run_script

if __name__ == "__main__":
    run_script(partial(bundle, bundle_entries, PREFIXES), GROUPS, description=str(__doc__))
