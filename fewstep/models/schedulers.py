"""Between diffusers schedulers and our processes: what a teacher's scheduler means, what a student's must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from fewstep.core.errors import UserError
from fewstep.core.prediction import KINDS, Kind
from fewstep.core.schedule import VP, Flow, NoiseSchedule, shift
from fewstep.core.times import Step

_BETAS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def _flows(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def read(scheduler: Any) -> tuple[NoiseSchedule, Kind]:
    """The process and the prediction kind a diffusers scheduler stands for.

    Raises UserError for a scheduler of neither kind and for epsilon at a zero terminal SNR.
    """
    config = scheduler.config
    if _flows(scheduler):
        return Flow(), "flow_prediction"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"the scheduler {type(scheduler).__name__} is neither variance preserving nor flow matching: "
            "save the teacher with a DDIMScheduler or a FlowMatchEulerDiscreteScheduler"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in KINDS:
        raise UserError(f"the scheduler's prediction_type '{kind}' is none of {', '.join(KINDS)}")
    schedule = VP(scheduler.alphas_cumprod)
    if kind == "epsilon" and scheduler.alphas_cumprod[-1] <= 0:
        raise UserError("epsilon prediction is not finite at a zero terminal SNR: use v_prediction")
    return schedule, kind


def time_shift(scheduler: Any, mu: float | None = None) -> float:
    """The factor by which a flow scheduler shifts even times towards noise; 1 where it does not.

    `mu` is what its pipeline tells it of the size of the image. Raises UserError for a scheduler that has to be told.
    """
    if not _flows(scheduler):
        return 1.0
    if scheduler.config.get("use_dynamic_shifting") and mu is not None:
        return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(
            f"the scheduler {type(scheduler).__name__} shifts its times by the size of the image "
            "(use_dynamic_shifting): set model.shift"
        )
    return float(scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0)


def mu_of(scheduler: Any, tokens: int) -> float:
    """What pipelines that shift by the size of the image tell `scheduler` of one of so many `tokens`: a line."""
    known = scheduler.config
    (few, low), (many, high) = (
        (known.get(f"{end}_image_seq_len", count), known.get(f"{end}_shift", shift))
        for end, count, shift in (("base", 256, 0.5), ("max", 4096, 1.15))
    )
    return low + (high - low) * (tokens - few) / (many - few)


def flow_scheduler(flow_shift: float = 1.0) -> Any:
    """Euler on a flow model, in the form that class-conditional diffusers pipelines accept."""
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=1,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=flow_shift,
        final_sigmas_type="zero",
    )


def vp_scheduler(kind: Kind, betas: Mapping[str, Any]) -> Any:
    """DDIM with trailing timesteps; `betas` has beta_schedule, beta_start, beta_end (or trained_betas) and so on."""
    return diffusers.DDIMScheduler(
        **{name: betas[name] for name in _BETAS if name in betas},
        prediction_type=kind,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _betas_of(scheduler: Any) -> dict[str, Any]:
    """What makes a stock scheduler of the process of `scheduler`: its own settings, or, where these say more, betas."""
    said = {name: scheduler.config[name] for name in _BETAS if name in scheduler.config}
    product = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
    again = diffusers.DDIMScheduler(**said).alphas_cumprod.double()
    if torch.allclose(again, product, rtol=1e-4, atol=1e-7):
        return said
    kept = product / torch.cat([product.new_ones(1), product[:-1]])
    return {"num_train_timesteps": len(product), "trained_betas": (1 - kept).tolist()}


def renoising_flow_scheduler(steps: int, flow_shift: float = 1.0) -> Any:
    """Fresh noise at every step of a flow model, for pipelines that read prompts.

    Its `steps` times end at that of an even ladder, 1 / steps before the shift; left alone the last one would be
    1 / 1000 and its pass wasted.
    """
    last = float(shift(torch.tensor(1 / steps, dtype=torch.float64), flow_shift))
    return diffusers.FlowMatchLCMScheduler(shift=flow_shift, shift_terminal=last)


def student_scheduler(
    teacher: Any,
    kind: Kind,
    transition: str,
    steps: int,
    flow_shift: float = 1.0,
    prompted: bool = False,
    even: bool = False,
) -> Any:
    """The stock scheduler to save beside a student of `steps` passes; None where diffusers has none for its steps.

    `teacher` is the scheduler the process came from; `prompted` says that the pipeline reads prompts, `even` that it
    hands the scheduler even times.
    """
    if kind == "flow_prediction":
        if steps > 1 and transition == "renoise" and prompted:
            return renoising_flow_scheduler(steps, flow_shift)
        if steps > 1 and transition != "ode":
            return None
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=flow_shift) if even else flow_scheduler(flow_shift)
    if steps > 1 and transition not in ("ode", "renoise"):
        return None
    betas = _betas_of(teacher)
    if transition == "ode" or steps == 1:
        return vp_scheduler(kind, betas)
    return diffusers.LCMScheduler(
        **betas,
        prediction_type=kind,
        original_inference_steps=steps,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def steps_of(scheduler: Any, steps: int, even: bool = False) -> list[Step]:
    """The (told, level) pairs a diffusers scheduler walks in `steps` passes, its truncation of timesteps included.

    `even` says that its pipeline hands it the times 1, .., 1 / steps, before the shift.
    """
    trained = scheduler.config.num_train_timesteps
    if steps > trained:
        raise UserError(f"{steps} steps were asked for, but the schedule has only {trained}")
    scheduler.set_timesteps(steps, **({"sigmas": np.linspace(1, 1 / steps, steps)} if even else {}))
    if _flows(scheduler):
        pairs = zip(scheduler.timesteps.tolist(), scheduler.sigmas[:-1].tolist(), strict=True)
        return [Step(told / trained, sigma) for told, sigma in pairs]
    return [Step((index + 1) / trained, (index + 1) / trained) for index in scheduler.timesteps.tolist()]


def student_steps(
    schedule: NoiseSchedule, scheduler: Any | None, steps: int, flow_shift: float, even: bool = False
) -> list[Step]:
    """The student's steps: those of the scheduler that will be exported, or evenly spaced and shifted without one."""
    if scheduler is not None:
        return steps_of(scheduler, steps, even)
    even = shift(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), flow_shift)
    return [Step(t, t) for t in schedule.snap(even).tolist()]
