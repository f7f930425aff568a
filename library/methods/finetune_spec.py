"""Training of whole models, as methods: their specs, and what is checked before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data.config.file import read_config
from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods.spec import MethodSpec
from library.options.finetune import DREAMBOOTH_GROUPS, FINETUNE_GROUPS, AnyData, FinetuneOptions

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits


def check_options(opts: Options, traits: FamilyTraits | None = None) -> list[str]:
    """One line for each subset of --dataset_config that is not of the kind the script takes."""
    path = opts.data.dataset_config
    if path is None or isinstance(opts.data, AnyData):
        return []
    try:
        config = read_config(path)
    except UserError:
        return []  # whoever builds the data set from it says what is wrong
    wanted = isinstance(opts.method, FinetuneOptions)
    reason = (
        "has no metadata_file, which fine-tuning needs; train_db.py takes folders of images"
        if wanted
        else "has a metadata_file; train_db.py takes folders of images, fine_tune.py takes metadata files"
    )
    return [
        f"{path}, [[datasets]] {number}, [[datasets.subsets]] {place}: {reason}"
        for number, dataset in enumerate(config["datasets"], 1)
        for place, subset in enumerate(dataset["subsets"], 1)
        if ("metadata_file" in subset) != wanted
    ]


FINETUNE = MethodSpec(
    name="finetune",
    title="Trains a whole model: {model}.",
    tracker="finetuning",
    usage="--ckpt={file}",
    groups=FINETUNE_GROUPS,
    method=EntryPoint("library.methods.finetune:FinetuneMethod"),
    check=check_options,
)
DREAMBOOTH = MethodSpec(
    name="dreambooth",
    title="Trains a whole model, {model}, on folders of images of a concept (DreamBooth).",
    tracker="dreambooth",
    usage=FINETUNE.usage,
    groups=DREAMBOOTH_GROUPS,
    method=FINETUNE.method,
    check=check_options,
)
