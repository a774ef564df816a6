"""LPIPS against torchvision's VGG16 and the formula of the paper, its files, and what is said when they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from fewstep.core.errors import UserError
from fewstep.models.lpips import BLOCKS, load_lpips
from fewstep.objectives.pieces.distances import perceived

LOOKED_AT = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of torchvision


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    torch.manual_seed(0)
    return make_layers(cfgs["D"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(vgg: nn.Module) -> dict[str, Tensor]:
    """As torchvision and the package name them; some linear weights are zero, as in the published ones."""
    torch.manual_seed(1)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1).sub(0.2).clamp(min=0) for i, (c, _) in enumerate(BLOCKS)}
    return {**{f"features.{name}": value for name, value in vgg.state_dict().items()}, **linear}


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, place)
    return place


def by_the_formula(vgg: nn.Module, weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """sum_l mean over places of sum_c w_lc (f_a - f_b)^2, features of unit length; mean over samples."""
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    total, level = torch.zeros(()), 0
    maps = [(x - shift) / scale for x in (a, b)]
    for i, layer in enumerate(vgg):
        maps = [layer(x.clone()) for x in maps]
        if i in LOOKED_AT:
            one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in maps)
            total = total + (weights[f"lin{level}.model.1.weight"] * (one - other).square()).sum(1).mean()
            level += 1
    return total


def test_it_is_the_formula_on_torchvisions_vgg(vgg: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    net = load_lpips(file, side=32)
    expected = by_the_formula(vgg, weights, a, b)
    assert perceived(a, b, net).item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3
    assert perceived(a, a, net) == 0 and not any(p.requires_grad for p in net.parameters())
    a.requires_grad_()
    (slope,) = torch.autograd.grad(perceived(a, b, net), a)
    (theirs,) = torch.autograd.grad(by_the_formula(vgg, weights, a, b), a)
    assert torch.allclose(slope, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_images_are_brought_to_one_size(file: Path) -> None:
    net, small = load_lpips(file, side=32), torch.rand(1, 3, 16, 16)
    large = F.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
    assert all(torch.equal(a, b) for a, b in zip(net(small), net(large), strict=True))
    assert load_lpips(file).side == 224


def test_the_names_of_the_package_are_read(weights: dict[str, Tensor], file: Path, tmp_path: Path) -> None:
    """net.slice1.0.weight and the like, in a file of torch; what is doubled or of the scaling is left aside."""
    named = {}
    for name, value in weights.items():
        if name.startswith("features."):
            _, index, kind = name.split(".")
            part = 1 + sum(int(index) > end for end in LOOKED_AT)
            named[f"net.slice{part}.{index}.{kind}"] = value
        else:
            named[name], named[name.replace("lin", "lins.", 1)] = value, value
    torch.save({**named, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "lpips.pth")
    images = torch.rand(1, 3, 32, 32)
    ours, theirs = load_lpips(tmp_path / "lpips.pth", 32), load_lpips(file, 32)
    assert all(torch.equal(a, b) for a, b in zip(ours(images), theirs(images), strict=True))


def test_flat_images_have_a_finite_gradient(file: Path) -> None:
    """Where all features of a place are zero, nothing is divided by it."""
    net, flat = load_lpips(file, side=32), torch.zeros(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        net.features[0].bias.fill_(-100)
    (slope,) = torch.autograd.grad(perceived(flat, torch.rand(1, 3, 32, 32), net), flat)
    assert torch.isfinite(slope).all()


def test_what_is_no_file_of_lpips(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights of LPIPS at"):
        load_lpips(tmp_path / "absent.safetensors")
    (tmp_path / "odd.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_lpips(tmp_path / "odd.pth")
    torch.save({name: value for name, value in weights.items() if "features" in name}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="5 of 31 are absent"):
        load_lpips(tmp_path / "vgg.pth")
