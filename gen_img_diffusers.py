"""Generates images, as gen_img.py does, for old command lines. Guide: docs/gen_img.md"""

from library.generation.script import OLD as GROUPS
from library.generation.script import run

if __name__ == "__main__":
    run(str(__doc__), GROUPS)
