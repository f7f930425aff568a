"""Training of a ControlNet beside the model, as a method: its spec. No torch."""

from __future__ import annotations

from library.entry_points import EntryPoint
from library.methods.spec import MethodSpec
from library.options.control_net import CONTROL_NET_GROUPS

CONTROL_NET = MethodSpec(
    name="control_net",
    title="Trains a ControlNet for {model} on pairs of images and control images.",
    tracker="control_net_train",
    groups=CONTROL_NET_GROUPS,
    method=EntryPoint("library.methods.control_net:ControlNetMethod"),
    image_role="control",
)
