from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import VP, Flow
from fewstep.models import schedulers
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.rollout import Rollout, transition

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (3, 8, 8)


def teacher(**changes: Any) -> Any:
    return diffusers.DDIMScheduler(**{**BETAS, **changes})


def levels(scheduler: Any, steps: int) -> list[float]:
    return [step.level for step in schedulers.steps_of(scheduler, steps)]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "family",
    [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.EulerDiscreteScheduler, diffusers.LCMScheduler],
)
def test_variance_preserving_schedulers_are_read(family: Any, kind: str) -> None:
    scheduler = family(**BETAS, prediction_type=kind)
    schedule, read = schedulers.read(scheduler)
    assert read == kind and isinstance(schedule, VP)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        schedulers.flow_scheduler(3.0),
    ],
)
def test_flow_schedulers_are_read(scheduler: Any) -> None:
    schedule, kind = schedulers.read(scheduler)
    assert isinstance(schedule, Flow) and kind == "flow_prediction"


@pytest.mark.parametrize("family", [diffusers.EDMEulerScheduler, diffusers.CMStochasticIterativeScheduler])
def test_other_schedulers_are_refused_by_name(family: Any) -> None:
    with pytest.raises(UserError, match=f"{family.__name__} is neither variance preserving nor flow matching"):
        schedulers.read(family())


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="'score' is none of epsilon, sample, v_prediction, flow_prediction"):
        schedulers.read(teacher(prediction_type="score"))


def test_epsilon_at_a_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(UserError, match="not finite at a zero terminal SNR: use v_prediction"):
        schedulers.read(teacher(rescale_betas_zero_snr=True, prediction_type="epsilon"))
    schedule, _ = schedulers.read(teacher(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert isinstance(schedule, VP) and schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("route", ["renoise", "ode"])
def test_a_vp_student_walks_the_documented_timesteps(route: str) -> None:
    scheduler = schedulers.student_scheduler(teacher(), "epsilon", route, 4)
    steps = schedulers.steps_of(scheduler, 4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert [step.told for step in steps] == [step.level for step in steps] == [1, 0.75, 0.5, 0.25]
    for count in (1, 2, 8):
        one = schedulers.student_scheduler(teacher(), "epsilon", route, count)
        assert levels(one, count) == [1 - i / count for i in range(count)]


@pytest.mark.parametrize("route, steps, family", [("renoise", 1, "DDIM"), ("renoise", 2, "LCM"), ("ode", 2, "DDIM")])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_vp_student_keeps_the_process_of_its_teacher(route: str, steps: int, family: str, kind: Any) -> None:
    odd = teacher(beta_start=0.002, beta_end=0.03, rescale_betas_zero_snr=kind == "v_prediction")
    scheduler = schedulers.student_scheduler(odd, kind, route, steps)
    assert type(scheduler).__name__ == f"{family}Scheduler"
    assert torch.equal(scheduler.alphas_cumprod, odd.alphas_cumprod)
    assert scheduler.config.prediction_type == kind and scheduler.config.clip_sample is False
    schedule, read = schedulers.read(scheduler)
    assert read == kind and isinstance(schedule, VP)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_student_walks_the_sigmas_and_truncated_timesteps_of_diffusers(shift: float) -> None:
    scheduler = schedulers.student_scheduler(schedulers.flow_scheduler(), "flow_prediction", "ode", 4, shift)
    steps = schedulers.steps_of(scheduler, 4)
    even = [0.999 - 0.24975 * i for i in range(4)]
    shifted = [shift * t / (1 + (shift - 1) * t) for t in even]
    assert [step.level for step in steps] == pytest.approx(shifted, abs=1e-6)
    assert [step.told for step in steps] == [int(1000 * t) / 1000 for t in shifted]


@pytest.mark.parametrize("route", ["renoise", "cps", "gamma"])
def test_flow_students_that_renoise_have_no_stock_scheduler(route: str) -> None:
    assert schedulers.student_scheduler(schedulers.flow_scheduler(), "flow_prediction", route, 2) is None
    one = schedulers.student_scheduler(schedulers.flow_scheduler(), "flow_prediction", route, 1)
    assert one.config.use_flow_sigmas is True


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_flow_students_that_read_prompts_renoise(steps: int, shift: float) -> None:
    """Times from 1 down to the last of an even ladder; the walk is ours, noise and all."""
    scheduler = schedulers.student_scheduler(
        schedulers.flow_scheduler(), "flow_prediction", "renoise", steps, shift, prompted=True
    )
    walk = schedulers.steps_of(scheduler, steps)
    last = shift / steps / (1 + (shift - 1) / steps)
    assert walk[0].level == 1 and walk[-1].level == pytest.approx(last, abs=1e-6) and len(walk) == steps
    assert schedulers.read(scheduler)[1] == "flow_prediction" and schedulers.time_shift(scheduler) == shift
    x, generator = torch.randn(2, *SHAPE), torch.Generator().manual_seed(5)
    mine, fresh = x, torch.Generator().manual_seed(5)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.sin(x), t, x, generator=generator, return_dict=False)[0]
        after = walk[i + 1].level if i + 1 < steps else 0.0
        mine = (1 - after) * (mine - walk[i].level * torch.sin(mine)) + after * torch.randn(2, *SHAPE, generator=fresh)
    assert torch.allclose(x, mine, atol=1e-5)


@pytest.mark.parametrize("route", ["cps", "gamma"])
def test_vp_students_with_other_transitions_have_no_stock_scheduler(route: str) -> None:
    assert schedulers.student_scheduler(teacher(), "epsilon", route, 2) is None
    assert levels(schedulers.student_scheduler(teacher(), "epsilon", route, 1), 1) == [1]


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_a_flow_teacher_is_walked_by_its_own_sigmas_and_times(scheduler: Any) -> None:
    steps = schedulers.steps_of(scheduler, 4)
    assert [step.level for step in steps] == pytest.approx(scheduler.sigmas[:4].tolist())
    assert [step.told for step in steps] == pytest.approx((scheduler.timesteps / 1000).tolist())
    assert schedulers.time_shift(scheduler) == 3


def test_the_time_shift_of_a_teacher_is_read() -> None:
    assert schedulers.time_shift(diffusers.FlowMatchEulerDiscreteScheduler()) == 1
    assert schedulers.time_shift(schedulers.flow_scheduler(5.0)) == 5
    assert schedulers.time_shift(teacher()) == 1
    with pytest.raises(UserError, match=r"shifts its times by the size of the image .*: set model\.shift"):
        schedulers.time_shift(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    short = schedulers.vp_scheduler("epsilon", {**BETAS, "num_train_timesteps": 20})
    assert len(schedulers.steps_of(short, 20)) == 20
    with pytest.raises(UserError, match="21 steps were asked for, but the schedule has only 20"):
        schedulers.steps_of(short, 21)


def test_a_student_without_a_scheduler_walks_even_steps(vp: VP) -> None:
    flow = schedulers.student_steps(Flow(), None, 4, 3.0)
    assert [step.level for step in flow] == pytest.approx([1, 0.9, 0.75, 0.5])
    thirds = schedulers.student_steps(vp, None, 3, 1.0)
    assert [step.level for step in thirds] == pytest.approx([1, 0.667, 0.333]) and thirds[1].told == thirds[1].level
    exported = schedulers.student_steps(vp, schedulers.vp_scheduler("epsilon", BETAS), 4, 9.0)
    assert [step.level for step in exported] == [1, 0.75, 0.5, 0.25]


class Fixed(Draw):
    """Draws the n-th of some prepared tensors at the n-th purpose `rollout.n`."""

    def __init__(self, prepared: Tensor):
        super().__init__(0, 0, torch.arange(prepared.shape[1]))
        object.__setattr__(self, "prepared", prepared)

    def normal(self, purpose: str, shape: Any) -> Tensor:
        return self.prepared[int(purpose.split(".")[1])]  # type: ignore[attr-defined]


def diffusers_walk(scheduler: Any, net: nn.Module, noise: Tensor, cond: Condition, steps: int) -> Tensor:
    """The loop of diffusers' own pipelines."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        value = net(scheduler.scale_model_input(x, t), t, class_labels=cond.inputs["class_labels"]).sample
        x = scheduler.step(value, t, x, return_dict=False)[0]
    return x


ROUTES = [("epsilon", "ode"), ("sample", "ode"), ("v_prediction", "ode"), ("flow_prediction", "ode")]
ROUTES += [("epsilon", "renoise"), ("sample", "renoise"), ("v_prediction", "renoise")]


@pytest.mark.parametrize("kind, route", ROUTES)
@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_our_rollout_is_the_walk_of_diffusers(
    kind: Any, route: str, steps: int, tiny_unet: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = schedulers.flow_scheduler() if kind == "flow_prediction" else teacher(prediction_type=kind)
    scheduler = schedulers.student_scheduler(source, kind, route, steps, flow_shift=2.0)
    schedule, read = schedulers.read(scheduler)
    net, cond = tiny_unet(), Condition({"class_labels": torch.tensor([0, 3])})
    noise, fresh = torch.randn(2, *SHAPE), torch.randn(steps, 2, *SHAPE)
    left = iter(fresh)
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", lambda *args, **kwargs: next(left))
    theirs = diffusers_walk(scheduler, net, noise, cond, steps)
    rollout = Rollout(schedulers.steps_of(scheduler, steps), transition(route))  # type: ignore[arg-type]
    mine = rollout(DiffusersBackbone(net, schedule, read), noise, cond, Fixed(fresh)).x0
    assert (mine - theirs).abs().max() / theirs.abs().max() < 2e-5
