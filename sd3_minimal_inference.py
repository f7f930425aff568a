"""Generates an image with Stable Diffusion 3 and 3.5; gen_img.py has more options. Guide: docs/gen_img.md"""

from library.families.sd3.minimal import Sd3MinimalOptions
from library.generation.minimal import groups_of, run

GROUPS = groups_of(Sd3MinimalOptions)

if __name__ == "__main__":
    run(str(__doc__), GROUPS, "sd3")
