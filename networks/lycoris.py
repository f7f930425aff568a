"""`--network_module networks.lycoris`: the algorithms of LyCORIS, chosen by `algo=` in --network_args."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from networks.arguments import Reader
from networks.registry import BOFT, FULL, GLORA, IA3, LOCON, LOHA_FULL, LOKR_FULL, LORA, NORM, OFT, SET, type_of
from networks.selections.preset import PresetSelection
from networks.spec import NetworkArgs, NetworkModule, NetworkType

ALGOS = {
    "lora": LOCON,
    "locon": LOCON,
    "loha": LOHA_FULL,
    "lokr": LOKR_FULL,
    "full": FULL,
    "ia3": IA3,
    "glora": GLORA,
    "diag-oft": OFT,
    "boft": BOFT,
    "norm": NORM,
}


@dataclass(frozen=True, kw_only=True)
class LycorisModule(NetworkModule):
    """A module whose type is an argument, and whose files may have layers of several types."""

    @property
    def argument_names(self) -> list[str]:
        own = [name for kind in ALGOS.values() for name in kind.args.NAMES]
        return list(dict.fromkeys([*super().argument_names, *own]))

    @property
    def types(self) -> Sequence[NetworkType[Any]]:
        return [LORA, SET, *dict.fromkeys(ALGOS.values())]

    def type_for(self, reader: Reader) -> NetworkType[Any]:
        algo = reader.args.get("algo", "").strip().lower() or "lora"
        if algo not in ALGOS:
            reader.refuse("algo", f"is none of {', '.join(name for name in ALGOS if name != 'norm')}")
        return ALGOS.get(algo, LOCON)

    def type_of_entry(self, tensors: Iterable[str], args: NetworkArgs) -> NetworkType[Any]:
        found = type_of(tensors)
        return LOCON if found in (None, LORA) else found


MODULE = LycorisModule(name=__name__, type=LOCON, selection=PresetSelection)
