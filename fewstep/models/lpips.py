"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): the distance of images in weighted features of VGG16."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep import reading
from fewstep.core.errors import UserError

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""channels and convolutions of VGG16; the last convolution of each block is looked at"""
SIDE = 224
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_CONVOLUTION = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"lin(\d)\.model\.1\.weight")


class Lpips(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> five feature maps; LPIPS is the sum of their squared distances.

    Squares are summed over channels and averaged over places: each map has length one at every place, times the root
    of the linear layers' weights. Images are resized to `side`, 224 in DMD.
    """

    def __init__(self, side: int = SIDE):
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        before = 3
        for channels, count in BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
        self.features = nn.Sequential(*layers)
        self.linear = nn.ParameterList(torch.ones(channels) for channels, _ in BLOCKS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images.float()
        maps: list[Tensor] = []
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale
        for layer, after in zip(self.features, [*self.features[1:], nn.MaxPool2d(2)], strict=True):
            x = layer(x)
            if isinstance(after, nn.MaxPool2d):
                weight = self.linear[len(maps)].clamp(min=0).sqrt()[:, None, None]
                maps.append(weight * F.normalize(x, dim=1, eps=1e-10))
        return maps


def load_lpips(path: Path, side: int = SIDE) -> Lpips:
    """The frozen network of a local file, in evaluation mode; nothing is downloaded.

    The file, .safetensors or one that torch opens with weights_only, names its tensors as torchvision's VGG16 and the
    package lpips do: features.0.weight (or net.slice1.0.weight) and lin0.model.1.weight. Raises UserError.
    """
    net = Lpips(side)
    found: dict[str, Tensor] = {}
    for name, value in _read(path).items():
        if match := _CONVOLUTION.fullmatch(name):
            found[f"features.{match[1]}.{match[2]}"] = value
        elif match := _LINEAR.fullmatch(name):
            found[f"linear.{match[1]}"] = value.flatten()
    wanted = net.state_dict()
    if wrong := sorted(n for n in wanted if n not in found or found[n].shape != wanted[n].shape):
        raise UserError(
            f"{path} has not all weights of LPIPS on VGG16, {len(wrong)} of {len(wanted)} are absent or of another "
            f"shape, such as {wrong[0]}: put VGG16's features and the linear layers of the package lpips into one file"
        )
    net.load_state_dict({name: found[name].float() for name in wanted})
    return net.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there are no weights of LPIPS at {path}: fetch them once, or use another distance")
    if path.suffix == ".safetensors":
        return reading.tensors(path)
    reading.plain(path, reading.ARCHIVE)
    with path.open("rb") as file:
        packed = file.read(4) == b"PK\x03\x04"  # files of torch before 1.6 are no archives
    if packed:
        reading.unpacks(path)
    try:
        state = torch.load(path, "cpu", weights_only=True)
    except Exception:  # its advice is to let the file run its code
        raise UserError(
            f"{path} cannot be read as weights: it holds more than tensors, or is damaged; nothing of it was run"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} cannot be read as weights: it holds no names and tensors")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
