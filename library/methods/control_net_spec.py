"""Training of a ControlNet or a ControlNet-LLLite beside the model, as methods: their specs. No torch."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.methods.spec import MethodSpec
from library.options.control_net import CONTROL_NET_GROUPS, LLLITE_GROUPS

CONTROL_NET = MethodSpec(
    name="control_net",
    title="Trains a ControlNet for {model} on pairs of images and control images.",
    tracker="control_net_train",
    usage="--control_net_models={file} --guide_image_path=control.png",
    groups=CONTROL_NET_GROUPS,
    method=EntryPoint("library.methods.control_net:ControlNetMethod"),
    image_role="control",
)

LLLITE = MethodSpec(
    name="lllite",
    title="Trains a ControlNet-LLLite for {model} on pairs of images and control images.",
    tracker="lllite_control_net_train",
    groups=LLLITE_GROUPS,
    method=EntryPoint("library.methods.control_net:LlliteMethod"),
    image_role="control",
)
