from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.draw import Draw

MANY = 1 << 16
GOLDEN_UNIFORM = [0.5306143164634705, 0.26888734102249146, 0.041996777057647705]
GOLDEN_NORMAL = [-1.08746743, -2.17369509, 0.83268183, -0.79762417, 0.30373445, -0.55903089]
GOLDEN_INTEGERS = [974, 724, 604]
GOLDEN_SHARED = 137


def draw(ids: Tensor | range, step: int = 3, seed: int = 11) -> Draw:
    return Draw(seed, step, ids if isinstance(ids, Tensor) else torch.tensor(list(ids)))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


def test_a_row_does_not_depend_on_its_batch() -> None:
    whole = draw(range(12)).normal("z", (3, 4, 4))
    order = torch.tensor([7, 2, 11, 0])
    assert torch.equal(draw(order).normal("z", (3, 4, 4)), whole[order])
    parts = [draw(part).normal("z", (3, 4, 4)) for part in torch.arange(12).chunk(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(order).uniform("u", (2,)), draw(range(12)).uniform("u", (2,))[order])
    assert torch.equal(draw(order).integers("i", 9), draw(range(12)).integers("i", 9)[order])


def test_draws_do_not_depend_on_each_other_or_on_torch() -> None:
    one = draw(range(4))
    first = one.normal("z", (5,))
    one.uniform("u")
    torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(one.normal("z", (5,)), first)


@pytest.mark.parametrize("other", [{"seed": 12}, {"step": 4}, {"purpose": "y"}, {"ids": range(4096, 8192)}])
def test_every_part_of_the_key_changes_the_draw(other: dict[str, object]) -> None:
    def made(seed: int = 11, step: int = 3, purpose: str = "z", ids: range = range(4096)) -> Tensor:
        return draw(ids, step, seed).normal(purpose, (16,))

    a, b = made(), made(**other)  # type: ignore[arg-type]
    assert (a == b).float().mean() < 1e-4
    assert correlation(a, b) < 4 / MANY**0.5
    assert correlation(a**2, b**2) < 4 / MANY**0.5


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbouring_ids_and_elements_are_independent(lag: int) -> None:
    z = draw(range(MANY // 8)).normal("z", (8,))
    assert correlation(z[lag:], z[:-lag]) < 4 / MANY**0.5
    flat = draw(range(1)).normal("z", (MANY,))[0]
    assert correlation(flat[lag:], flat[:-lag]) < 4 / MANY**0.5


def test_both_halves_of_box_and_muller_are_independent() -> None:
    first, second = draw(range(4)).normal("z", (MANY // 2,)).chunk(2, 1)
    for f in (lambda x: x, lambda x: x**2, torch.abs):
        assert correlation(f(first), f(second)) < 4 / first.numel() ** 0.5


def test_normal_moments_and_law() -> None:
    z = draw(range(64)).normal("z", (4, 32, 32)).double().flatten()
    count = z.numel()
    for power, exact, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (z**power).mean().item() == pytest.approx(exact, abs=4 * (variance / count) ** 0.5)
    distance = (torch.special.ndtr(z.sort().values) - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at one in a thousand
    assert 4.5 < z.abs().max() < 6


def test_uniform_law_and_open_ends() -> None:
    u = draw(range(MANY)).uniform("u", (4,)).double().flatten()
    count = u.numel()
    assert u.min() > 0 and u.max() < 1
    assert (u.sort().values - (torch.arange(count) + 0.5) / count).abs().max() < 1.95 / math.sqrt(count)
    assert draw(range(5)).uniform("u").shape == (5,)


def test_integers_are_uniform() -> None:
    counts = draw(range(MANY)).integers("k", 13).bincount(minlength=13).double()
    assert len(counts) == 13
    chi_square = ((counts - MANY / 13) ** 2 / (MANY / 13)).sum()
    assert chi_square < 32.9  # twelve degrees of freedom, one in a thousand


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_shape_is_served(count: int) -> None:
    z = draw(range(3)).normal("z", (count,))
    assert z.shape == (3, count) and torch.isfinite(z).all() and z.unique().numel() == 3 * count


def test_the_shared_integer_is_the_same_on_every_micro_batch() -> None:
    seen = []
    for step in range(400):
        answers = {draw(part, step).shared_integer("exit", 4) for part in torch.arange(8).chunk(4)}
        assert len(answers) == 1
        seen += answers
    counts = torch.tensor(seen).bincount(minlength=4).double()
    assert ((counts - 100) ** 2 / 100).sum() < 16.3  # three degrees of freedom, one in a thousand
    assert draw(range(3)).shared_integer("a", 1 << 20) != draw(range(3)).shared_integer("b", 1 << 20)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 5, -4])
def test_any_integer_is_a_seed(seed: int) -> None:
    z = draw(range(2000), seed=seed).normal("z", (8,))
    assert abs(z.mean().item()) < 4 / 16000**0.5 and abs(z.std().item() - 1) < 4 / 32000**0.5


def test_draws_are_the_same_for_ever() -> None:
    """Golden numbers: a change here changes every run's data order and every stored teacher pair."""
    one = Draw(7, 2, torch.tensor([0, 1, 10_000_000_000]))
    assert one.uniform("u").tolist() == pytest.approx(GOLDEN_UNIFORM, abs=1e-7)
    assert one.normal("z", (2,)).flatten().tolist() == pytest.approx(GOLDEN_NORMAL, abs=2e-6)
    assert one.integers("k", 1000).tolist() == GOLDEN_INTEGERS
    assert one.shared_integer("exit", 1000) == GOLDEN_SHARED
