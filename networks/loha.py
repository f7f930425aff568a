"""`--network_module networks.loha`: LoHa on every family."""

from __future__ import annotations

from networks.registry import LOHA
from networks.selections.named import NamedSelection
from networks.spec import NetworkModule

MODULE = NetworkModule(name=__name__, type=LOHA, selection=NamedSelection)
