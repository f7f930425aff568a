"""What a simulation says about a run: whether it fits, and how much memory, disk and time it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.options.devices import GIB, LAUNCH
from library.planning.simulation import Request, Simulated

if TYPE_CHECKING:
    from library.training.saving import SaveRequest

PROCESS = 3 * GIB // 4  # of CPU memory: Python, torch and the libraries of a run
WORKER = GIB // 4  # of CPU memory: a process that loads data
AT_MOST = 10_000  # occasions of saving that are counted one by one


@dataclass(frozen=True)
class Plan:
    """A simulated run."""

    request: Request
    simulated: Simulated

    @property
    def on_gpu(self) -> bool:
        return self.request.device.kind != "cpu"

    @property
    def device_bytes(self) -> int:
        """The most memory of the device that is needed at a time; on a CPU that of the whole run."""
        if not self.on_gpu:
            return self.cpu_bytes
        return self.simulated.peak(self.request.device.kind)[0] + self.request.device.overhead

    @cached_property
    def cpu_bytes(self) -> int:
        """The most CPU memory that is needed at a time."""
        opts = self.request.opts
        loads = opts.data.of_images and not self.simulated.caches_in_memory.get("latents")
        workers = opts.data.max_data_loader_n_workers if loads else 0
        caches = sum(self.simulated.caches_in_memory.values())
        return self.simulated.peak("cpu")[0] + PROCESS + WORKER * workers + caches

    @property
    def fits(self) -> bool:
        return self.device_bytes <= self.request.device.memory

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step over average batches."""
        of_largest = self.simulated.work["second step"].time
        return of_largest * self.simulated.mean_pixels / self.simulated.pixels + self.simulated.modulation_seconds

    @property
    def caching_seconds(self) -> float:
        """Seconds until everything is cached."""
        total = 0.0
        for name, times in self.simulated.cached_batches.items():
            total += self.simulated.work[name].time * times
        return total

    @property
    def seconds(self) -> float:
        """Of the whole run, without loading, saving and sample images."""
        return self.caching_seconds + self.step_seconds * self.request.run_plan.total_steps

    @property
    def images_per_second(self) -> float:
        return self.simulated.images / self.step_seconds if self.step_seconds else math.inf

    @cached_property
    def disk(self) -> dict[str, int]:
        """Bytes on disk over the whole run: caches, and the copies and states that lie there at most."""
        found = {f"cached {name}": size for name, size in self.simulated.caches_in_files.items()}
        copies, states = self._kept()
        copy = sum(self.simulated.files.values())
        found["saved copies"] = copies * copy
        if states:
            found["states"] = states * self.simulated.state_bytes
        return found

    def _kept(self) -> tuple[int, int]:
        """How many copies and states there are at most at a time."""
        saves, run_plan = self.simulated.saves, self.request.run_plan
        files: set[Path] = set()
        states: set[Path] = set()
        most, most_states = 0, 0
        every = saves.every_steps or run_plan.total_steps + 1
        steps = list(range(every, run_plan.total_steps + 1, every))[:AT_MOST]
        epochs = list(range(1, run_plan.epochs))[:AT_MOST]
        # Copies of steps and of epochs are removed apart, so that their order does not matter.
        dues: list[SaveRequest | None] = [saves.after_step(step) for step in steps]
        dues += [saves.after_epoch(epoch, run_plan.epochs) for epoch in epochs]
        for due in [*dues, saves.final()]:
            if due is None:
                continue
            files.add(due.path)
            states |= {due.state} if due.state else set()
            most, most_states = max(most, len(files)), max(most_states, len(states))
            files -= {due.obsolete}
            states -= {due.obsolete_state}
        return most, most_states

    def basis(self) -> str:
        """Where the seconds come from."""
        work, device = self.simulated.work["second step"], self.request.device
        terms = {
            "its computation": work.seconds,
            f"{work.operations:,} launches of {LAUNCH * 1e6:.0f} us": work.operations * LAUNCH,
            "copies over the bus": max(work.bytes_to_device, work.bytes_to_cpu) / device.bus,
        }
        slowest = max(terms, key=lambda name: terms[name])
        seconds = self.simulated.modulation_seconds
        ahead = f", and {seconds:.2g} s for modulation ahead" if self.request.opts.modulation.count else ""
        return (
            f"{work.flops / 1e12:.3g} TFLOP a step, {device.basis}, 80 % of its rates; for the largest batch "
            f"{work.time:.3g} s, bound by {slowest}{ahead}; not measured"
        )

    def to_json(self) -> dict[str, Any]:
        device, simulated, run_plan = self.request.device, self.simulated, self.request.run_plan
        return {
            "fits": self.fits,
            "device": {"name": device.name, "kind": device.kind, "memory": device.memory, "basis": device.basis},
            "device_bytes": self.device_bytes,
            "device_overhead": device.overhead,
            "cpu_bytes": self.cpu_bytes,
            "phases": [
                {"name": phase.name, "peaks": {kind: peak.to_json() for kind, peak in phase.peaks.items()}}
                for phase in simulated.phases
            ],
            "disk": self.disk,
            "caches_in_memory": simulated.caches_in_memory,
            "trained": simulated.trained,
            "steps": run_plan.total_steps,
            "epochs": run_plan.epochs,
            "seconds_per_step": self.step_seconds,
            "seconds": self.seconds,
            "basis": self.basis(),
        }
