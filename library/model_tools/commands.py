"""What the scripts in networks/ do that merge, extract, resize and convert networks, and their options. No torch."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.families.registry import TOOLS
from library.options.base import OptionGroup, Options
from library.options.logging import ConsoleOptions
from library.options.network_tools import (
    CheckWeightsOptions,
    ConvertOptions,
    ConvertPairOptions,
    DyLoraOptions,
    ResizeOptions,
    SvdMergeOptions,
)

merge: EntryPoint[[Options], None] = EntryPoint("library.model_tools.network_into_model:merge")
extract: EntryPoint[[Options], None] = EntryPoint("library.model_tools.network_from_models:extract")
svd_merge: EntryPoint[[Options], None] = EntryPoint("library.model_tools.svd_merging:svd_merge")
resize: EntryPoint[[Options], None] = EntryPoint("library.model_tools.resizing:resize_lora")
cut_dylora: EntryPoint[[Options], None] = EntryPoint("library.model_tools.dylora_cutting:cut_dylora")
convert: EntryPoint[[Options], None] = EntryPoint("library.model_tools.converting:convert_lora")
convert_pair: EntryPoint[[Options, str], None] = EntryPoint("library.model_tools.converting:convert_pair")
check_weights: EntryPoint[[Options], None] = EntryPoint("library.model_tools.inspecting:check_weights")
interrogate: EntryPoint[[Options], None] = EntryPoint("library.model_tools.inspecting:interrogate")

# The groups of scripts that ask for no model; the others' are the families'.
_SHARED: dict[str, type[OptionGroup]] = {
    "svd_merge_lora": SvdMergeOptions,
    "resize_lora": ResizeOptions,
    "extract_lora_from_dylora": DyLoraOptions,
    "convert_lora": ConvertOptions,
    "convert_flux_lora": ConvertPairOptions,
    "check_lora_weights": CheckWeightsOptions,
}


def groups_of(script: str) -> tuple[type[OptionGroup], ...]:
    """The option groups of a script, by its name."""
    return ({**TOOLS, **_SHARED}[script], ConsoleOptions)
