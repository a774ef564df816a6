"""Reference statistics: what generated images are compared with, stored with the protocol they were made by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.evals.extractors import Extractor
from fewstep.evals.frechet import Statistics

_PARTS = ("mu", "sigma", "n", "features", "protocol")
MOST_FEATURES = 10_000
"""features that are kept beside the statistics, for distances between samples"""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, up to `MOST_FEATURES` of their features (N, D), and `protocol`, what both are of."""

    statistics: Statistics
    features: Tensor
    protocol: Mapping[str, Any]

    @classmethod
    def of(cls, features: Tensor, extractor: Extractor, what: str) -> Reference:
        """From features (N, D) of the images that `what` names."""
        protocol = {"of": what, "extractor": extractor.name, "weights": extractor.sha256, "resize": extractor.resize}
        return cls(Statistics.of(features), features[:MOST_FEATURES].float(), protocol)

    @property
    def sha256(self) -> str:
        """Of mean and covariance, float64."""
        digest = hashlib.sha256(self.statistics.mean.numpy().tobytes())
        digest.update(self.statistics.covariance.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, file: Path) -> None:
        """Writes `file`, an .npz of mu, sigma, n, features and protocol; whole or not at all."""
        aside = file.with_name(f".{file.name}.partial.npz")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            aside,
            mu=self.statistics.mean.numpy(),
            sigma=self.statistics.covariance.numpy(),
            n=np.int64(self.statistics.count),
            features=self.features.numpy(),
            protocol=np.array(json.dumps(dict(self.protocol), sort_keys=True)),
        )
        aside.rename(file)


def load(file: Path, extractor: Extractor) -> Reference:
    """The reference in an .npz file. Raises UserError for another format, and for features of another extractor."""
    reference = read(file)
    protocol = reference.protocol
    if protocol["weights"] != extractor.sha256:
        raise UserError(
            f"the reference {file} is of {protocol['extractor']} with other weights than this {extractor.name}: "
            "distances between the two mean nothing; make it anew with these weights"
        )
    return reference


def read(file: Path) -> Reference:
    """The reference in an .npz file, whatever it is of. Raises UserError for what is none."""
    try:
        reading.unpacks(file)
        with np.load(file) as stored:
            held = {name: stored[name] for name in _PARTS}
        mean, covariance = (torch.from_numpy(held[name]).double() for name in ("mu", "sigma"))
        protocol = reading.parsed(str(held["protocol"]))
        count, features = int(held["n"]), torch.from_numpy(held["features"])
        _refuse(mean, covariance, features, count, protocol)
    except Exception as error:  # damaged archives end in errors of many kinds
        reason = reading.shown(next(iter(str(error).splitlines()), type(error).__name__))
        raise UserError(
            f"{file} is no reference of fewstep (mu, sigma, n, features and protocol in an .npz): {reason}"
        ) from None
    return Reference(Statistics(mean, covariance, count), features, protocol)


def _refuse(mean: Tensor, covariance: Tensor, features: Tensor, count: int, protocol: Any) -> None:
    """Raises ValueError where the parts do not fit."""
    width = len(mean)
    if mean.shape != (width,) or covariance.shape != (width, width) or features.shape[1:] != (width,):
        raise ValueError("the shapes of mu, sigma and features do not fit")
    if count < 1 or not features.is_floating_point():
        raise ValueError("n counts images, and features are floating point numbers")
    if not (mean.isfinite().all() and covariance.isfinite().all() and features.isfinite().all()):
        raise ValueError("it holds numbers that are not finite")
    if not isinstance(protocol, dict) or not {"weights", "extractor"} <= protocol.keys():
        raise ValueError("its protocol names no extractor and no weights")


def cache_folder() -> Path:
    """Where references are kept: $FEWSTEP_CACHE, or fewstep in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fewstep"
    return Path(os.environ.get("FEWSTEP_CACHE", default)) / "references"


def cached(recipe: Mapping[str, Any]) -> Path:
    """The file of the reference that `recipe` describes."""
    key = hashlib.sha256(json.dumps(dict(recipe), sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / f"{key}.npz"
