"""`--network_module networks.lokr`: LoKr on every family."""

from __future__ import annotations

from networks.registry import LOKR
from networks.selections.named import NamedSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=LOKR, selection=NamedSelection)
