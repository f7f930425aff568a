"""The training methods. A new one is a module with its `MethodSpec`, and one line here. No torch."""

from __future__ import annotations

from library.methods.control_net_spec import CONTROL_NET, LLLITE
from library.methods.embedding_spec import EMBEDDING, XTI
from library.methods.finetune_spec import DREAMBOOTH, FINETUNE
from library.methods.leco_spec import LECO
from library.methods.network_spec import NETWORK

METHODS = {spec.name: spec for spec in (NETWORK, FINETUNE, DREAMBOOTH, EMBEDDING, XTI, CONTROL_NET, LLLITE, LECO)}
