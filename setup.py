"""Makes `library` and `networks` importable from anywhere (`pip install -e .`); the scripts run without it."""

from pathlib import Path

from setuptools import find_packages, setup

requirements = [
    line
    for line in Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

setup(
    name="trainscripts",
    version="0.1.0",
    packages=find_packages(include=["library", "library.*", "networks", "networks.*"]),
    package_data={"library.text": ["clip_vocabulary/*", "t5_vocabulary/*"]},
    python_requires=">=3.10,<3.14",
    install_requires=requirements,
)
