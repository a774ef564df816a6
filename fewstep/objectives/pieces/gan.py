"""The diffusion GAN on features of a score network (DMD2, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.models.backbone import Backbone, frozen
from fewstep.models.head import Heads
from fewstep.objectives.pieces.carried import carried

GanLoss = Literal["softplus", "hinge"]


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """softplus(l_fake) + softplus(-l_real), or max(0, 1 + l_fake) + max(0, 1 - l_real), mean over logits."""
    if kind == "hinge":
        return relu(1 + fake_logits).mean() + relu(1 - real_logits).mean()
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def generator_loss(fake_logits: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """The non-saturating softplus(-l_fake), or the hinge's -l_fake, mean over logits."""
    return -fake_logits.mean() if kind == "hinge" else softplus(-fake_logits).mean()


def roughness(logits: Tensor, nearby: Tensor) -> Tensor:
    """Approximate R1 (APT, arXiv:2501.08316): mean (l(x) - l(x + s n))^2, which is s^2 |dl/dx|^2 for small s."""
    return (logits - nearby).square().mean()


@torch.no_grad()
def accuracy(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Share of samples told apart: 0.5 is a discriminator that knows nothing."""
    return 0.5 * ((fake_logits < 0).float().mean() + (real_logits > 0).float().mean())


def heard(
    watched: Backbone, heads: Heads, x_t: Tensor, t: Tensor, cond: Condition, kind: GanLoss, stop: bool = True
) -> tuple[Prediction, Tensor, Tensor]:
    """A pass of `watched` at x_t, the logits (B,), and the generator's loss, differentiable in x_t alone."""
    leaf = x_t.detach().requires_grad_()
    with frozen(watched), frozen(heads):
        prediction = watched(leaf, t, cond, taps=heads.names, stop=stop)
        logits = heads.each(prediction.features)
        adversarial = carried(generator_loss(logits, kind), leaf, x_t)
    return prediction, logits.detach().mean(1), adversarial


def heads_for(watched: Backbone, taps: Sequence[str], x: Tensor, cond: Condition) -> Heads:
    """The heads that fit the blocks `taps` of `watched` on inputs such as x (B, *S).

    Raises UserError for a block that is not there or does not depend on x.
    """
    x = x.clone().requires_grad_()
    try:
        with frozen(watched):
            features = watched(x, x.new_full((len(x),), 0.5), cond, taps=taps, stop=True).features
    except ValueError as error:
        raise UserError(f"objective.gan_taps: {error}") from None
    if deaf := [name for name, feature in features.items() if not feature.requires_grad]:
        raise UserError(f"objective.gan_taps: the block {deaf[0]} does not look at the image: choose another")
    return Heads({name: feature.detach() for name, feature in features.items()})
