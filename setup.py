"""Makes `library` and `networks` importable from anywhere (`pip install -e .`); the scripts run without it."""

from pathlib import Path

from setuptools import find_packages, setup

FILES = Path(__file__).with_name("requirements")


def read(name: str) -> list[str]:
    lines = (FILES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


extras = {file.stem: read(file.stem) for file in FILES.glob("*.txt") if file.stem != "core"}

setup(
    name="trainscripts",
    version="0.1.0",
    packages=find_packages(include=["library", "library.*", "networks", "networks.*"]),
    package_data={
        "library.pages": ["*.html", "*.css", "*.js"],
        "library.text": ["clip_vocabulary/*", "t5_vocabulary/*"],
    },
    python_requires=">=3.10,<3.15",
    install_requires=read("core"),
    extras_require=extras,
)
