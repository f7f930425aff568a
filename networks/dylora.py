"""`--network_module networks.dylora`: one training for every rank up to the network's."""

from __future__ import annotations

from networks.registry import DYLORA
from networks.selections.unet import OneRankSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=DYLORA, selection=OneRankSelection)
