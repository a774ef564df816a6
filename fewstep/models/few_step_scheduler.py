"""A scheduler for the steps of students that no stock diffusers scheduler takes.

An exported pipeline carries this file beside its table. It needs diffusers alone.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """One row (timestep, a, b, c) a network pass: the next state is a output + b state + c noise.

    The noise is fresh, or with `again` the one that the walk began with. After the last row the state is the sample.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        table: list[list[float]],
        again: bool = False,
        num_train_timesteps: int = 1000,
        use_flow_sigmas: bool = False,
    ):
        self.set_timesteps(len(table))

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, mu: float = 1.0
    ) -> None:
        """Raises ValueError for another number of passes than the student was trained for. `mu` changes nothing."""
        rows = self.config["table"]
        if num_inference_steps != len(rows):
            raise ValueError(
                f"this pipeline was trained for {len(rows)} steps, but {num_inference_steps} was given: "
                f"set num_inference_steps={len(rows)}"
            )
        self.timesteps = torch.tensor([row[0] for row in rows], device=device)
        self.passes = 0

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state (B, *S) after the next row; the rows are taken in their order."""
        _, a, b, c = self.config["table"][self.passes]
        if self.passes == 0:
            self.first = sample
        self.passes += 1
        moved = a * model_output.float() + b * sample.float()
        if c and self.config["again"]:
            moved = moved + c * self.first.float()
        elif c:
            moved = moved + c * randn_tensor(sample.shape, generator=generator, device=sample.device)
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
