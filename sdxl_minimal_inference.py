"""Generates an image with SDXL; gen_img.py has more options. Guide: docs/gen_img.md"""

from library.families.sdxl.minimal import SdxlMinimalOptions
from library.generation.minimal import groups_of, run

GROUPS = groups_of(SdxlMinimalOptions)

if __name__ == "__main__":
    run(str(__doc__), GROUPS, "sdxl")
