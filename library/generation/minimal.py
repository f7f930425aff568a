"""The small inference scripts: their options in the words of gen_img.py, which does the work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.errors import UserError
from library.families.registry import FAMILIES
from library.generation.model_options import family_spec
from library.generation.script import ALL_FAMILIES, Start, generate
from library.inference.prompt_lines import MINIMAL
from library.options import validation
from library.options.base import COMMAND_LINE, Given, Options, build_options
from library.options.inference import GenerationConsole
from library.preparation.common.script import run_script
from library.preparation.common.summary import Outcome

if TYPE_CHECKING:
    from library.families.shared.minimal import MinimalOptions
    from library.options.base import OptionGroup
    from library.types import FamilyTraits

# Options of gen_img.py by which messages may begin, and what they are called here.
_NAMES = {
    "ckpt": "ckpt_path",
    "outdir": "output_dir",
    "network_weights": "lora_weights",
    "W": "width",
    "H": "height",
    "scale": "cfg_scale",
    "guidance_scale": "guidance",
    "t5xxl_max_token_length": "t5xxl_token_length",
}


def groups_of(options: type[MinimalOptions]) -> tuple[type[OptionGroup], ...]:
    return (options, GenerationConsole)


def run(
    description: str,
    groups: Sequence[type[OptionGroup]],
    family: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a script and exits; see `library.generation.script.run`. Args: family: None: one for several families."""

    def traits(opts: Options) -> FamilyTraits | None:
        chosen = family or opts.minimal.family
        return FAMILIES[chosen].traits if chosen else None

    def work(opts: Options) -> Outcome:
        options: MinimalOptions = opts.minimal
        given = {name: Given(value, COMMAND_LINE) for name, value in options.generating().items() if value is not None}
        if not options.interactive:
            given["prompt"] = Given(options.prompt, COMMAND_LINE)
        made = build_options(ALL_FAMILIES, given)
        literal = options.prompt.replace("{", "\\{").replace("}", "\\}")  # braces are no choice here
        start = Start(
            entry={"prompt": literal, "negative_prompt": options.negative_prompt or ""},
            syntax=MINIMAL,
            negative_prompt=options.negative_prompt or "",
            training=options.training(),
            second_text=getattr(options, "prompt2", None),
            keeps_surroundings=options.keeps_surroundings,
        )
        chosen, names = family or options.family, {**_NAMES, **options.names}
        try:
            problems = validation.problems(made, traits(opts) or family_spec(made.checkpoint)[0].traits)
            if problems:
                raise UserError(*problems)
            return generate(made, chosen, start)
        except UserError as error:
            ours = [re.sub(r"^--(\w+)", lambda flag: f"--{names.get(flag[1], flag[1])}", one) for one in error.problems]
            raise UserError(*ours, hint=error.hint) from error

    run_script(work, groups, argv, description=description, traits=traits)
