"""What holds for every objective that is found, on real networks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tiny import CASES, WIDE, Roles, Tiny, batches, make, turns
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.objectives import base
from fewstep.train.loop import train_step
from fewstep.train.player import PlayerConfig

SMOOTH = PlayerConfig(lr=0.3, betas=[0.9, 0.999], eps=1.0, clip=1.0)
"""With a large eps Adam moves in proportion to the gradient: its sign would make rounding visible."""

FLOW = [case for case in CASES if case.endswith("flow")]
every_objective = pytest.mark.parametrize("case", CASES)
every_objective_and_roles = pytest.mark.parametrize(
    ("case", "learn"),
    [*((case, "full") for case in CASES), *((case, how) for case in FLOW for how in ("lora", "shared"))],
)


def moved(before: dict[str, Tensor], tiny: Tiny) -> set[str]:
    return {name for name, p in tiny.weights().items() if not torch.equal(before[name], p)}


def snapshot(tiny: Tiny) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tiny.weights().items()}


@every_objective_and_roles
def test_a_turn_touches_its_player_alone(case: str, learn: Roles) -> None:
    """Gradient and move of every turn of four steps; grad mode and frozen weights are as before after each yield."""
    tiny = make(case, SMOOTH, learn=learn)
    below = [p.detach().clone() for p in tiny.base_weights()]
    assert bool(below) == (learn != "full")
    trainable = {name for name, p in tiny.weights().items() if p.requires_grad}
    played = set()
    for step in range(4):
        for turn in turns(tiny, step):
            assert torch.is_grad_enabled()
            assert trainable == {name for name, p in tiny.weights().items() if p.requires_grad}
            for player in tiny.players.values():
                player.clear()
            turn.loss.backward()
            mine = tiny.of_player(turn.player)
            assert {name for name, p in tiny.weights().items() if p.grad is not None} <= mine
            played.add(turn.player)
            if turn.move:
                before = snapshot(tiny)
                tiny.players[turn.player].move(step)
                changed = moved(before, tiny)
                drawn = tiny.objective.drawn() if turn.player == "generator" else {}
                assert changed & mine and changed <= mine.union(*(tiny.of_player(role) for role in drawn))
    assert played == set(tiny.players)
    assert all(p.grad is None and torch.equal(p, before) for p, before in zip(tiny.base_weights(), below, strict=True))
    assert trainable == set().union(*(tiny.of_player(name) for name in tiny.players))


@every_objective
def test_the_teacher_stays_as_it_was(case: str) -> None:
    """Bit for bit, weights and buffers, over three steps of the loop; the others have moved."""
    tiny = make(case, PlayerConfig(lr=1e-3))
    before = {role: {k: v.clone() for k, v in net.state_dict().items()} for role, net in tiny.networks().items()}
    for step in range(3):
        train_step(tiny.objective, batches(tiny, step, 4), step, tiny.players)
    same = {
        role: all(torch.equal(before[role][k], v) for k, v in net.state_dict().items())
        for role, net in tiny.networks().items()
        if before[role]
    }
    assert {role for role, unchanged in same.items() if unchanged} == set(base.FROZEN) & set(same)


@every_objective
def test_four_micro_batches_are_one_batch(case: str) -> None:
    """The same weights to 1e-6 after two moves on eight samples, and the same moves to 1e-3 of themselves."""
    ends, start, logs = [], snapshot(make(case, SMOOTH)), []
    for parts in (1, 4):
        tiny = make(case, SMOOTH)
        for step in (0, 6):
            logs.append(train_step(tiny.objective, batches(tiny, step, 8, parts), step, tiny.players))
        ends.append(snapshot(tiny))
    one, four = ends
    for role in {name.split(".")[0] for name, p in tiny.weights().items() if p.requires_grad}:
        names = [name for name in one if name.startswith(role)]
        first, whole, split = (torch.cat([w[name].double().flatten() for name in names]) for w in (start, one, four))
        assert (whole - first).norm() > 1e-5 * first.norm()
        assert (split - whole).norm() < 1e-6 * whole.norm()
        assert (split - whole).norm() < 1e-3 * (whole - first).norm()
    for alone, split_logs in zip(logs[:2], logs[2:], strict=True):
        assert alone.keys() == split_logs.keys()
        for name in (name for name in alone if name.endswith(("/loss", "/grad_norm"))):
            assert split_logs[name] == pytest.approx(alone[name], rel=1e-4)


def gradients(case: str, learn: Roles, checkpointed: bool, steps: int = 2) -> tuple[Tiny, dict[str, Tensor]]:
    """The gradient of every weight over `steps` steps without a move, summed in absolute value."""
    tiny = make(case, SMOOTH, checkpointed, learn=learn)
    total: dict[str, Tensor] = {}
    for step in range(steps):
        for turn in turns(tiny, step):
            for player in tiny.players.values():
                player.clear()
            turn.loss.backward()
            for name, p in tiny.weights().items():
                if p.grad is not None:
                    total[name] = total.get(name, 0) + p.grad.abs()
    return tiny, total


@every_objective_and_roles
def test_every_weight_of_every_player_gets_a_gradient(case: str, learn: Roles) -> None:
    """With gradient checkpointing the same one, to 1e-4 of the largest of its tensor.

    The bias of the keys is left out: it shifts all logits of a softmax alike, so its gradient is zero but for rounding.
    """
    tiny, plain = gradients(case, learn, False)
    largest = max(g.max().item() for g in plain.values())
    silent = [
        name
        for player in tiny.players
        for name in tiny.of_player(player)
        if not name.endswith("to_k.bias") and (name not in plain or plain[name].max() < 1e-9 * largest)
    ]
    assert not silent
    _, checkpointed = gradients(case, learn, True)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).abs().max() <= 1e-4 * gradient.max() + 1e-9 * largest


@pytest.mark.parametrize("case", FLOW)
def test_an_objective_that_does_not_say_it_reads_data_needs_none(case: str) -> None:
    tiny = make(case, SMOOTH)
    reads = tiny.objective.reads
    assert set(reads) <= {"x0", "pair", "path"}
    (given,) = batches(tiny, 0, 2)
    assert (given.x0 is None) == ("x0" not in reads) and (given.pair is None) == ("pair" not in reads)
    train_step(tiny.objective, [given], 0, tiny.players)


def test_the_data_free_methods_are_data_free() -> None:
    for case in ("boot", "dmd-free", "dmd2-free", "freeflow", "phased_dmd"):
        assert make(f"{case}/flow", SMOOTH).objective.reads == ()
    for case in ("dmd", "ladd", "rectified_flow", "rectified_flow-distill"):
        assert make(f"{case}/flow", SMOOTH).objective.reads == ("pair",)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view of what was there before, such as the images of the batch, is nothing new.
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_live_bytes_are_counted() -> None:
    """A chain of five 4 kB tensors of which two live at a time, then one that is kept by a graph."""
    start = torch.zeros(1024)
    with LiveBytes() as live:
        x = start + 1
        for _ in range(4):
            x = x + 1
        assert live.peak == 2 * 4096 and live.now == 4096
        w = torch.ones(1024, requires_grad=True)
        y = (w * x).exp()
        del x
        assert live.now == 4096 * 3  # w, and x and y in the graph; exp keeps its result
        del y
        assert live.now == 4096


def peak(case: str, parts: int) -> tuple[int, int]:
    """Peak of live bytes in a step whose generator moves, and what was left after it; six samples a micro-batch."""
    tiny = make(case, PlayerConfig(lr=1e-4), sizes=WIDE)
    train_step(tiny.objective, batches(tiny, 0, 2), 0, tiny.players)  # optimizer states exist
    given = batches(tiny, 4, 6 * parts, parts)
    with LiveBytes() as live:
        train_step(tiny.objective, given, 4, tiny.players)
    return live.peak, live.now


@pytest.mark.parametrize("case", FLOW)
def test_four_micro_batches_take_the_memory_of_one(case: str) -> None:
    """At most 1.1 times the peak of one: only one graph is alive at a time."""
    (one, left_one), (four, left_four) = peak(case, 1), peak(case, 4)
    assert one > 2_000_000 and four < 1.1 * one
    assert left_four <= left_one + 1024


def test_a_graph_that_is_kept_would_be_noticed() -> None:
    """The measurement can fail: adding up the four losses and differentiating once takes over twice the memory."""
    tiny = make("diffusion/flow", PlayerConfig(lr=1e-4), sizes=WIDE)
    with LiveBytes() as live:
        losses = [turn.loss for step in range(4) for turn in turns(tiny, step, 6)]
        torch.stack(losses).sum().backward()
    assert live.peak > 2 * peak("diffusion/flow", 1)[0]


def test_networks_start_apart_and_labels_matter() -> None:
    """The contract's networks are not degenerate: another class gives another answer, and the roles differ."""
    tiny = make("dmd2/vp", SMOOTH)
    (given,) = batches(tiny, 0, 4)
    other = given.cond.with_inputs(class_labels=(given.cond.inputs["class_labels"] + 1) % 4)
    nets: list[nn.Module] = [tiny.objective.triad.generator, tiny.objective.triad.fake_score]
    answers = [net(given.noise, torch.full((4,), 0.5), given.cond).value for net in nets]
    assert (answers[0] - answers[1]).abs().max() > 1e-2
    assert (nets[0](given.noise, torch.full((4,), 0.5), other).value - answers[0]).abs().max() > 1e-4
