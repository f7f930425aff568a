"""What a run would need, found out before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError
from library.options.base import OptionGroup, Options, opt
from library.options.devices import Device, device_named, device_of_memory, parse_memory

if TYPE_CHECKING:
    from library.types import FamilyTraits

_WITH = ("plan", "plan_apply")


@dataclass(frozen=True, kw_only=True)
class PlanningOptions(OptionGroup, group="planning", title="Planning", always=True):
    plan: bool = opt(
        False,
        "train nothing, and show what the run would need: memory by phase, disk, steps and time, found by running its "
        "code on tensors without values; status 0 if it fits the device, 3 if not",
    )
    plan_vram: str | None = opt(
        None, "memory of the device to plan for, such as 12GB; by default that of this machine", only_with=_WITH
    )
    plan_device: str | None = opt(
        None, "GPU to plan for, such as 'RTX 4090'; by default the one of this machine", only_with=_WITH
    )
    plan_json: str | None = opt(None, "file to write the plan to as JSON", only_with=_WITH)
    plan_apply: bool = opt(
        False, "plan, and then train: as it is if that fits, else with the first of the changes that make it fit"
    )

    @property
    def wanted(self) -> bool:
        return self.plan or self.plan_apply

    def device(self) -> Device | None:
        """The device to plan for; None: the one of this machine. Raises: UserError: unknown, or no size."""
        if self.plan_device is None and self.plan_vram is None:
            return None
        memory = None
        if self.plan_vram is not None:
            try:
                memory = parse_memory(self.plan_vram)
            except ValueError as error:
                raise UserError(f"--plan_vram: {error}") from None
        if self.plan_device is None:
            return device_of_memory(memory)
        device = device_named(self.plan_device)
        return device if memory is None else device.with_memory(memory)

    def check(self, opts: Options, traits: FamilyTraits) -> Iterable[str]:
        if not self.wanted:
            return
        try:
            self.device()
        except UserError as error:
            yield from error.problems
