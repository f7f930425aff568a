"""Generates images with Stable Diffusion 1.x, 2.x, SDXL, 3 and 3.5, and FLUX.1. Guide: docs/gen_img.md"""

from library.generation.script import ALL_FAMILIES as GROUPS
from library.generation.script import run

if __name__ == "__main__":
    run(str(__doc__), GROUPS)
