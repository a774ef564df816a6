from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, add_noise, expand, vp_from_betas
from fewstep.models.backbone import Guided, passes
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.inner import FROM, NOISE, TO, Headed
from fewstep.models.tangent import Direction, Tangent, along
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.tmd import Config, Objective
from fewstep.rollout import Rollout, Step, ode

VP = vp_from_betas("linear", 1e-4, 0.02)
SHAPE = (3, 8, 8)
X, COND = torch.zeros(2, *SHAPE), Condition({"class_labels": torch.tensor([0, 3])})
T = torch.tensor([0.3, 0.9])


def plain(seed: int = 0) -> DiffusersBackbone:
    return DiffusersBackbone(tiny.unet(seed, SHAPE, 8), Flow(), "flow_prediction", tiny.NULL)


def headed(steps: int, speaks: bool = False, split: str = "") -> Headed:
    """With `speaks` the convolution and the dials are no longer silent."""
    net = Headed(plain(), steps, split, X, COND)
    torch.manual_seed(1)
    for weight in [*net.embed.parameters(), *net.inner.dials.parameters()] if speaks else []:
        torch.nn.init.normal_(weight, std=0.1)
    return net


def batch_of(rows: int = 4, seed: int = 0) -> Batch:
    draw = Draw(seed, 0, torch.arange(rows))
    cond = Condition({"class_labels": torch.arange(rows) % tiny.LABELS})
    return Batch(draw.normal("noise", SHAPE), cond, draw, 0.5 * draw.normal("x0", SHAPE))


def walk(*levels: float) -> Rollout:
    return Rollout([Step(level, level) for level in levels], ode)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_at_the_start_the_student_is_the_teacher(steps: int) -> None:
    net, x, noise = headed(steps), torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    with torch.no_grad():
        said = net(x, T, COND.with_inputs(**{NOISE: noise})).value
        assert torch.allclose(said, net.inner(x, T, COND).value, atol=1e-5)


def test_blocks_from_memory_are_the_blocks() -> None:
    """One inner step by the whole network in one go, its dials and y added by hand, is the same number."""
    net, x, y = headed(1, speaks=True), torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    ones, zeros = torch.ones(2), torch.zeros(2)
    blocks = net.inner.net
    time = blocks.time_embedding(blocks.time_proj(1000 * T)) + blocks.class_embedding(COND.inputs["class_labels"])
    told = time + net.inner.dials[FROM](ones) + net.inner.dials[TO](zeros)
    with torch.no_grad():
        sample, kept = blocks.conv_in(x), []
        kept.append(sample)
        for block in blocks.down_blocks:
            sample, states = block(hidden_states=sample, temb=time)
            kept += states
        sample = blocks.mid_block(sample, time) + net.embed(y)
        for block in blocks.up_blocks:
            count = len(block.resnets)
            sample = block(sample, tuple(kept[-count:]), told)
            kept = kept[:-count]
        by_hand = blocks.conv_out(blocks.conv_act(blocks.conv_norm_out(sample)))
        ours = net(x, T, COND.with_inputs(**{NOISE: y})).value
    assert torch.allclose(ours, by_hand, atol=1e-5)


def test_the_trunk_runs_once() -> None:
    net, ran = headed(3, speaks=True), {"down": 0, "up": 0}
    blocks = net.inner.net
    real_down, real_up = (type(part).forward for part in (blocks.down_blocks[0], blocks.up_blocks[0]))

    def counted(name: str, real: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            ran[name] += 1
            return real(self, *args, **kwargs)

        return forward

    patch = pytest.MonkeyPatch()
    patch.setattr(type(blocks.down_blocks[0]), "forward", counted("down", real_down))
    patch.setattr(type(blocks.up_blocks[0]), "forward", counted("up", real_up))
    net(torch.randn(2, *SHAPE), T, COND.with_inputs(**{NOISE: torch.randn(2, *SHAPE)}))
    patch.undo()
    downs = sum(type(block) is type(blocks.down_blocks[0]) for block in blocks.down_blocks)
    ups = sum(type(block) is type(blocks.up_blocks[0]) for block in blocks.up_blocks)
    assert ran == {"down": downs, "up": 3 * ups}


def test_what_it_costs() -> None:
    """1 + (N - 1) H / L, H the weights that run again; a guided student's pass costs twice that."""
    net = headed(3)
    again = sum(
        p.numel() for n, p in net.inner.net.named_parameters() if not n.startswith(("down_blocks", "mid_block"))
    )
    share = again / sum(p.numel() for p in net.inner.net.parameters())
    assert 0.1 < share < 0.9 and passes(net) == pytest.approx(1 + 2 * share)
    assert passes(Guided(net, 2.0)) == pytest.approx(2 + 4 * share)
    assert walk(1.0, 0.5).passes(net) == pytest.approx(2 + 4 * share)


def test_every_inner_step_carries_the_gradient() -> None:
    """With two steps, the head's answer at s = 1/2 depends on the one at s = 1: the dial of that time learns too."""
    net = headed(2, speaks=True)
    net(torch.randn(2, *SHAPE), T, COND.with_inputs(**{NOISE: torch.randn(2, *SHAPE)})).value.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)


def objective_of(stage: str, inner: int, generator: Any, **changes: Any) -> Objective:
    roles = {} if stage == "flow" else {"real_score": Guided(plain(2)), "fake_score": plain(3)}
    config = Config(stage=stage, inner=inner, **changes)  # type: ignore[arg-type]
    return Objective(config, Triad(generator, **roles), walk(1.0, 0.5))


def test_one_inner_step_is_dmd2() -> None:
    """The network itself, and the losses and gradients of DMD2 with a GAN, to the bit."""
    assert Objective.wrapped(Config(inner=1), net := plain(), X, COND) is net
    found = []
    for module, config in ((dmd2, dmd2.Config(ratio=2)), (None, Config(inner=1, ratio=2))):
        kind = dmd2.Objective if module else Objective
        triad = Triad(plain(), Guided(plain(2)).requires_grad_(False), plain(3))
        one = kind(config, triad, walk(1.0, 0.5))
        torch.manual_seed(4)
        one.attach(X, COND)
        for turn in one.turns(batch_of(), 0):
            parameters = list(getattr(triad, turn.player).parameters())
            found.append([turn.loss, *torch.autograd.grad(turn.loss, parameters, allow_unused=True)])
    assert len(found) == 4
    for theirs, ours in zip(found[:2], found[2:], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_equal_times_are_flow_matching() -> None:
    """With r = s the loss is |head - (eps - x0)|^2."""
    net, batch = headed(2, speaks=True), batch_of()
    objective = objective_of("flow", 2, net, equal=1.0)
    (turn,) = objective.turns(batch, 0)
    draw, x0 = batch.draw, batch.x0
    assert x0 is not None
    eps, start = (draw.normal(f"tmd.{word}", SHAPE) for word in ("eps", "start"))
    t = objective.draw_time(batch, "tmd.t", objective.config.flow_times)
    s, r = objective.interval(batch)
    moment = net.moment(add_noise(Flow(), x0, eps, t), t, batch.cond)
    y = eps - x0
    head = moment(y + expand(s, y) * (start - y), s, batch.cond, to=r).value
    assert torch.equal(s, r) and torch.allclose(turn.loss, (head - y).square().mean(), rtol=1e-5)


def test_differences_are_the_derivative_of_the_head() -> None:
    """The paper's way agrees with forward mode to 3 %: sinusoids of 1000 s leave that to a difference."""
    net = headed(2, speaks=True)
    moment = net.moment(torch.randn(2, *SHAPE), T, COND)
    y, toward = torch.randn(2, *SHAPE), Direction(torch.randn(2, *SHAPE), torch.ones(2))
    s, r = torch.tensor([0.5, 0.8]), torch.tensor([0.1, 0.7])
    exact, near = (along(moment, y, s, COND, toward, way, 2e-5, r) for way in ("exact", "difference"))
    assert (near - exact).norm() < 0.03 * exact.norm()


def test_the_inner_noise_is_drawn_for_every_step() -> None:
    net, batch = headed(2, speaks=True), batch_of()
    rollout, cond = walk(1.0, 0.5), batch.cond
    with torch.no_grad():
        once, again = (rollout(net, batch.noise, cond, batch.draw).x0 for _ in range(2))
        other = rollout(net, batch.noise, cond, Draw(1, 0, torch.arange(4))).x0
    assert torch.equal(once, again) and (once - other).abs().max() > 1e-3


def fresh(step: int, rows: int = 64) -> Draw:
    return Draw(5, step, torch.arange(rows))


@pytest.mark.slow
def test_the_head_learns_the_law_of_what_fits() -> None:
    """Images that are all 0.8 or all -0.8: a network's mean of them is 0, a head of four steps makes both.

    Seen after 400, 800, 1,200 and 1,600 moves: .73, .69, .78 and .72 in size, 202, 155, 270 and 202 of 512 positive.
    """
    net = headed(4)
    objective = objective_of("flow", 4, net, tangent=Tangent("exact"), equal=0.5)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(800):
        draw = fresh(step)
        x0 = 0.8 * torch.sign(draw.normal("sign", (1, 1, 1))).expand(-1, *SHAPE)
        cond = Condition({"class_labels": torch.zeros(64, dtype=torch.long)})
        (turn,) = objective.turns(Batch(draw.normal("noise", SHAPE), cond, draw, x0), step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
    draw, labels = fresh(9, 512), torch.zeros(512, dtype=torch.long)
    with torch.no_grad():
        x = walk(1.0)(net, draw.normal("noise", SHAPE), Condition({"class_labels": labels}), draw).x0.mean((1, 2, 3))
    assert x.abs().mean() > 0.5 and 8 < (x > 0).sum() < 504


WRONG: dict[str, tuple[Any, str]] = {
    "no block": (lambda: headed(2, split="nowhere"), "objective.split"),
    "no flow": (
        lambda: Headed(
            DiffusersBackbone(tiny.unet(0, SHAPE, 8), vp_from_betas("linear", 1e-4, 0.02), "epsilon"), 2, "", X, COND
        ),
        "take a flow teacher",
    ),
    "inner": (lambda: Config(inner=0), "inner is at least 1"),
    "flow of one": (lambda: Config(stage="flow", inner=1), "set objective.inner above 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_sentence(name: str) -> None:
    act, said = WRONG[name]
    with pytest.raises(UserError) as error:
        act()
    assert said in str(error.value)


def test_recomputed_blocks_are_refused() -> None:
    net = headed(2)
    net.inner.net.enable_gradient_checkpointing()
    with pytest.raises(UserError, match="gradient_checkpointing"):
        net(torch.randn(2, *SHAPE), T, COND.with_inputs(**{NOISE: torch.randn(2, *SHAPE)}))
