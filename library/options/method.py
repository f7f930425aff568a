"""What every method's option group says, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import OptionGroup


@dataclass(frozen=True, kw_only=True)
class MethodOptions(OptionGroup, group="method", title="Method", always=True):
    """The neutral method: nothing is trained."""

    trains_model: ClassVar[bool] = False  # whether the model's own weights are trained, and not only what is added
    usual_rate: ClassVar[str] = ""  # what this kind of training usually wants as --learning_rate, for a message
    can_be_sharded: ClassVar[bool] = False  # whether FSDP2 can shard what is trained over the processes
    # What only some methods offer. Without annotations: fields keep the order of the class that declares them.
    no_token_padding = False
    network_module = None  # of the network that is trained
    trains_inpainting = True  # whether it can be trained with a model for inpainting
    needs_common_rate = True  # whether a part is trained that has no rate of its own
    network_train_unet_only = True
    network_dropout = None
    train_t5xxl = False
    caption_words = ()  # what captions must hold for anything to be learned from them
    caption_templates = ()  # texts that replace the captions of training images
    controlnet_model_name_or_path = None
    lllite_weights = None  # the file of a ControlNet-LLLite that training continues from
