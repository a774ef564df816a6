from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evals.grid import save_grid


def test_pixels_land_where_they_should(tmp_path: Path) -> None:
    images = torch.full((3, 3, 2, 2), -1.0)
    images[1, 0] = 1
    images[2, :, 0, 1] = torch.tensor([0.0, 5.0, -5.0])
    save_grid(images, tmp_path / "grid.png", columns=2, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 8 + 2, 2 * 8 + 2, 3)
    assert (pixels[2:8, 2:8] == 0).all() and (pixels[:2] == 255).all() and (pixels[8:10] == 255).all()
    assert (pixels[2:8, 10:16] == [255, 0, 0]).all()
    assert (pixels[10:13, 5:8] == [128, 255, 0]).all() and (pixels[13:16, 2:8] == 0).all()
    assert (pixels[10:, 10:] == 255).all()


def test_row_labels_widen_the_grid(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 8, 8)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(images, tmp_path / "named.png", columns=2, row_labels=["one step", "two"])
    plain, named = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "named"))
    extra = named.shape[1] - plain.shape[1]
    assert extra > 0 and (named[:, extra:] == plain).all()
    assert (named[: plain.shape[0] // 2, :extra] < 128).any()
    with pytest.raises(ValueError, match="2 rows need 2 labels"):
        save_grid(images, tmp_path / "wrong.png", columns=2, row_labels=["one"])


def test_large_images_are_shrunk_to_a_tile(tmp_path: Path) -> None:
    """Twelve images of 1024 pixels would be twelve thousand wide."""
    save_grid(torch.rand(2, 3, 1024, 512) * 2 - 1, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as shown:
        assert shown.size == (2 * (160 + 2) + 2, 320 + 2 + 2)
