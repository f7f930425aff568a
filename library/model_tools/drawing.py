"""An image of a Diffusers model with a network file attached: networks/lora_diffusers.py."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.families.registry import FAMILIES
from library.options.base import OptionGroup, Options, opt
from library.options.logging import ConsoleOptions
from library.options.model_files import DrawingOptions
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SWITCHES = {
    name: opt(False, f"refuse other models than {spec.traits.label}; a model's kind is found out without it")
    for name, spec in FAMILIES.items()
    if spec is not next(iter(FAMILIES.values()))
}


@dataclass(frozen=True, kw_only=True)
class _Family(OptionGroup, group="expected", title="Model family"):
    """The kind of model that is expected."""


FamilyOptions: type[OptionGroup] = make_dataclass(
    "FamilyOptions",
    [(name, bool, field(default=made.default, metadata=made.metadata)) for name, made in _SWITCHES.items()],
    bases=(_Family,),
    frozen=True,
    kw_only=True,
    namespace={"__module__": __name__},
)
GROUPS = (DrawingOptions, FamilyOptions, ConsoleOptions)


def draw(opts: Options) -> None:
    """Writes one image of --prompt, made with --lora_weights attached to --model_id.

    Raises: UserError: a model or network that cannot be read, or that do not belong together.
    """
    import torch

    from library.families.shared.finding import family_of_pipeline
    from library.inference.images import save_png
    from library.model_tools.pipelines import attach
    from library.model_tools.weights import require_device

    chosen = opts.drawing
    device = require_device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline = load_pipeline("--model_id", chosen.model_id, torch.float16 if device.type == "cuda" else torch.float32)
    family = family_of_pipeline(pipeline)
    wrong = [name for name in _SWITCHES if getattr(opts.expected, name) and name != family]
    if wrong:
        raise UserError(f"--{wrong[0]}: {chosen.model_id} is {FAMILIES[family].kinds[0]}; leave the option out")
    pipeline.to(device)
    network = attach(pipeline, chosen.lora_weights, chosen.multiplier)
    LOGGER.info("%s: %d layers attached at %g", chosen.lora_weights, network.layers, chosen.multiplier)
    how: dict[str, Any] = {"num_inference_steps": chosen.steps}
    if chosen.negative_prompt:
        how["negative_prompt"] = chosen.negative_prompt
    rng = torch.Generator("cpu").manual_seed(chosen.seed)  # the same image on every device
    image = pipeline(prompt=chosen.prompt, generator=rng, **how).images[0]
    text = {"prompt": chosen.prompt, "negative-prompt": chosen.negative_prompt, "seed": str(chosen.seed)}
    save_png(image, Path(chosen.output), text)
    LOGGER.info("wrote %s", chosen.output)


def load_pipeline(flag: str, name: str, dtype: Any) -> DiffusionPipeline:
    """The pipeline of a Diffusers folder or hub id, on the CPU. Raises: UserError: it cannot be loaded.

    Args: flag: the option that gives its name.
    """
    from diffusers import DiffusionPipeline

    path = Path(name)
    if path.is_file():
        raise UserError(
            f"{flag}: {name} is a file; give a Diffusers folder (for SD 1.x and 2.x "
            "tools/convert_diffusers20_original_sd.py makes one)"
        )
    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, local_files_only=path.is_dir())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag}: {name} cannot be loaded ({first})") from None
