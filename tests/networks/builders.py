"""The builders of the network modules, by the modules' names."""

from __future__ import annotations

import networks.dylora
import networks.lora
import networks.lora_fa
import networks.lora_flux
import networks.lora_sd3
from networks.build import DeclaredBuilder

lora = DeclaredBuilder(networks.lora.MODULE)
lora_fa = DeclaredBuilder(networks.lora_fa.MODULE)
dylora = DeclaredBuilder(networks.dylora.MODULE)
lora_flux = DeclaredBuilder(networks.lora_flux.MODULE)
lora_sd3 = DeclaredBuilder(networks.lora_sd3.MODULE)
