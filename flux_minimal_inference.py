"""Generates an image with FLUX.1; gen_img.py has more options. Guide: docs/gen_img.md"""

from library.families.flux.minimal import FluxMinimalOptions
from library.generation.minimal import groups_of, run

GROUPS = groups_of(FluxMinimalOptions)

if __name__ == "__main__":
    run(str(__doc__), GROUPS, "flux")
