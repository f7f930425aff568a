"""The options of the small inference scripts, one for each family that has one. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from library.options.base import OptionGroup, Options, opt

if TYPE_CHECKING:
    from library.types import FamilyTraits


@dataclass(frozen=True, kw_only=True)
class MinimalOptions(OptionGroup, group="minimal", title="Image"):
    names: ClassVar[Mapping[str, str]] = {}  # options of gen_img.py -> what only this script calls them
    keeps_surroundings: ClassVar[bool] = False  # see `SourceImage.pinned`

    ckpt_path: str | None = opt(None, "model: a checkpoint file, a Diffusers folder or a hub id", required=True)
    prompt: str = opt("A photo of a cat", "what the image shows")
    negative_prompt: str | None = opt("", "what the image does not show; has an effect with a guidance scale above 1")
    output_dir: str = opt(".", "folder of the images; made if missing")
    lora_weights: list[str] | None = opt(
        None, "network files, each with its strength behind a semicolon if that is not 1: 'a.safetensors;0.8'"
    )
    interactive: bool = opt(
        False, "ask for further prompts, with options such as --w 512 --d 1 behind them, until the input ends"
    )

    def check(self, opts: Options, traits: FamilyTraits | None) -> Iterator[str]:
        for entry in self.lora_weights or ():
            _, semicolon, strength = entry.rpartition(";")
            try:
                float(strength if semicolon else 1)
            except ValueError:
                yield f"--lora_weights: {strength!r} behind the semicolon of {entry!r} is no number"

    @property
    def family(self) -> str | None:
        """The family that the options choose, of a script for several; None: the model's file shows it."""
        return None

    def networks(self) -> tuple[list[str], list[float]]:
        """Files and strengths of --lora_weights."""
        pairs = [entry.rpartition(";") for entry in self.lora_weights or ()]
        return [path or last for path, _, last in pairs], [float(last) if path else 1.0 for path, _, last in pairs]

    def generating(self) -> dict[str, Any]:
        """The options of gen_img.py that ask for the same."""
        files, strengths = self.networks()
        return {
            "ckpt": self.ckpt_path,
            "outdir": self.output_dir,
            "network_weights": files or None,
            "network_mul": strengths or None,
            "network_merge": getattr(self, "merge_lora_weights", False),
            "interactive": self.interactive,
        }

    def training(self) -> Mapping[str, Any]:
        """Options of training that decide how the model is kept."""
        return {}


def renamed(values: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Values under gen_img.py's names. Args: names: ours for theirs, e.g. W="width"; None is left out."""
    return {ours: values[theirs] for ours, theirs in names.items() if values[theirs] is not None}
