"""The names of --sample_sampler and the diffusers schedulers behind them, set up for the schedules of our families."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.inference.prompts import FLOW_SAMPLER, FLOW_SAMPLERS, SAMPLERS
from library.objectives import ddpm
from library.runtime.packages import remedy

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

# Ratio left at the last timestep of a zero-terminal schedule: small enough to be noise, large enough that
# sigma = sqrt((1 - a) / a) is finite. It is the smallest positive float16, as diffusers uses it.
_LAST_ALPHA_BAR = 2**-24

_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
_LINSPACE = {"timestep_spacing": "linspace"}
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**_LEADING, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {**_LEADING, "skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", _LINSPACE),
    "euler": ("EulerDiscreteScheduler", _LINSPACE),
    "euler_a": ("EulerAncestralDiscreteScheduler", _LINSPACE),
    "heun": ("HeunDiscreteScheduler", {**_LINSPACE, "clip_sample": False}),
    "dpm_2": ("KDPM2DiscreteScheduler", _LINSPACE),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", _LINSPACE),
    # The plain algorithm predicts noise, which has no limit at sigma 0: it must end at the smallest sigma.
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {**_LINSPACE, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {**_LINSPACE, "algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
}


def make_scheduler(
    name: str,
    *,
    steps: int,
    prediction_type: str,
    zero_terminal_snr: bool = False,
    zero_offset: bool = False,
    device: torch.device | str = "cpu",
) -> SchedulerMixin:
    """A fresh diffusers scheduler whose timesteps are set, on `device`.

    Args:
        name: one of SAMPLERS; a name with "k_" means the same as the one without.
        steps: denoising steps, 1..1000.
        prediction_type: "epsilon" or "v_prediction"; flow models have `make_flow_scheduler`.
        zero_terminal_snr: for models trained so; the first step then starts at the last timestep, from pure noise.
        zero_offset: samplers whose timesteps begin one later than they would by even division do without that.
    Raises: UserError: unknown name, a missing package, or too few steps for the sampler.
    """
    import diffusers

    if name not in SAMPLERS:
        raise UserError(f"--sample_sampler: unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    assert prediction_type in ("epsilon", "v_prediction"), prediction_type
    plain_name = name.removeprefix("k_")
    if plain_name == "lms" and importlib.util.find_spec("scipy") is None:
        raise UserError(f"--sample_sampler {name} needs the package scipy; {remedy('scipy')}")
    class_name, settings = _SCHEDULERS[plain_name]
    settings = {
        **settings,
        "num_train_timesteps": ddpm.NUM_TIMESTEPS,
        "beta_start": ddpm.BETA_START,
        "beta_end": ddpm.BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    if zero_terminal_snr:
        alpha_bar = ddpm.zero_terminal(ddpm.alpha_bars(ddpm.scaled_linear_betas()))
        alpha_bar[-1] = _LAST_ALPHA_BAR
        settings["trained_betas"] = ddpm.betas_of(alpha_bar).tolist()
    leading, multistep = settings.get("timestep_spacing") == "leading", "Multistep" in class_name
    # "leading" stops short of the last timestep, where a zero-terminal model begins. With every timestep in use, its
    # offset would reach past the last, and the multistep solvers' "linspace" would name one timestep twice.
    if (leading and zero_terminal_snr) or (steps == ddpm.NUM_TIMESTEPS and (leading or multistep)):
        settings |= {"timestep_spacing": "trailing", "steps_offset": 0}
    if zero_offset and "steps_offset" in settings:
        settings["steps_offset"] = 0
    scheduler = getattr(diffusers, class_name)(**settings)
    scheduler.set_timesteps(steps, device=device)
    if not scheduler.timesteps.isfinite().all():  # differences of sigmas, rounded below zero
        raise UserError(f"the sampler {name} cannot make an image in {steps} steps with this schedule; use more")
    return scheduler


def make_flow_scheduler(
    name: str = FLOW_SAMPLER, *, steps: int, shift: float, device: torch.device | str = "cpu"
) -> SchedulerMixin:
    """A fresh scheduler for models that predict the velocity of a rectified flow; timesteps are 1000 * sigma.

    Sigma goes from 1 to 0 in `steps` equal parts, each level then shifted to ``s sigma / (1 + (s - 1) sigma)``.
    DPM++ computes with log(1 - sigma), so that it begins at 0.999 in place of 1.

    Args:
        name: one of FLOW_SAMPLERS.
        steps: denoising steps, 1..1000. Heun evaluates the denoiser twice in each but the last.
        shift: s above 0; 1 leaves the levels as they are, above 1 more of the steps are spent on noisy latents.
        device: of the timesteps and sigmas.
    """
    import diffusers
    import numpy
    import torch

    assert name in FLOW_SAMPLERS, name
    if name == "dpmsolver++":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=ddpm.NUM_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(steps, device=device)
        # It rounds them to whole numbers, which is not where the latents are.
        scheduler.timesteps = (scheduler.sigmas[:-1] * ddpm.NUM_TIMESTEPS).to(device)
    elif name == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=ddpm.NUM_TIMESTEPS)
        scheduler.set_timesteps(steps, device=device)
        # Its own levels are shifted twice, and come so close to 0 that the last step does next to nothing.
        levels = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        levels = (shift * levels / (1 + (shift - 1) * levels)).to(device, torch.float32)
        last = levels.new_zeros(1)
        scheduler.sigmas = torch.cat([levels[:1], levels[1:].repeat_interleave(2), last])
        scheduler.timesteps = scheduler.sigmas[:-1] * ddpm.NUM_TIMESTEPS
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=ddpm.NUM_TIMESTEPS, shift=shift)
        scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps), device=device)
    scheduler.set_begin_index(0)  # otherwise it looks for its place by timestep, which waits for the device
    return scheduler
