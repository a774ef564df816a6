"""Rewards by the name that a config gives: built-in ones, or a function of a module of the user's own."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.data.source import Source
from fewstep.evals.reader import load_reader
from fewstep.models.codec import Codec
from fewstep.models.loading import locate

Reward = Callable[[Tensor, Condition], Tensor]
"""Images (B, 3, H, W) in [-1, 1] and their condition -> how good each of them is (B,), differentiable or not."""


def label_log_probability(source: Source) -> Reward:
    """log p(label | image) as the reader of the scenes sees it. Raises UserError where the samples are no scenes."""
    if source.world != "scenes":
        raise UserError(
            "objective.reward=label_log_probability reads the labels of the scenes: set data.source=scenes, or name "
            "a function of your own as module:function"
        )
    reader = load_reader(locate("assets/reader"))

    def reward(images: Tensor, cond: Condition) -> Tensor:
        reader.to(images.device)
        if "class_labels" not in cond.inputs:
            raise UserError(
                "objective.reward=label_log_probability reads the labels of the samples, but these networks are told "
                "none: take a teacher with class labels, or name a function of your own as module:function"
            )
        (kind, colour, *_), _ = reader(images)
        label = cond.inputs["class_labels"]
        said = kind.log_softmax(1), colour.log_softmax(1)
        parts = label // colour.shape[1], label % colour.shape[1]
        return sum(log.gather(1, part[:, None]).squeeze(1) for log, part in zip(said, parts, strict=True))  # type: ignore[return-value]

    return reward


BUILT_IN: dict[str, Callable[[Source], Reward]] = {"label_log_probability": label_log_probability}


def open_reward(name: str, source: Source, codec: Codec | None) -> Reward:
    """The reward of that name on what the networks make, decoded where that is latents. Raises UserError."""
    on_images = BUILT_IN[name](source) if name in BUILT_IN else own(name)

    def reward(samples: Tensor, cond: Condition) -> Tensor:
        images = samples if codec is None else codec.decode(samples)
        return checked(name, on_images(images.clamp(-1, 1), cond), samples)

    return reward


def own(name: str) -> Reward:
    """The function `module:function`. Raises UserError where there is none; the standard library holds no reward."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UserError(
            f"objective.reward is {' or '.join(BUILT_IN)} or module:function of your own, but '{name}' was given"
        )
    module, function = name.split(":")
    if module.split(".")[0] in {*sys.stdlib_module_names, *sys.builtin_module_names}:
        raise UserError(f"objective.reward={name}: {module} is part of Python: name a module of your own")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"objective.reward={name}: {error}; put the module where Python finds it") from None
    if not callable(found):
        raise UserError(f"objective.reward={name}: {module} has no function {function}")
    return found


def checked(name: str, reward: Tensor, samples: Tensor) -> Tensor:
    """The rewards, if there is one for each sample. Raises UserError."""
    if not isinstance(reward, Tensor) or reward.shape != samples.shape[:1]:
        given = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
        raise UserError(
            f"objective.reward={name} gives one number a sample, a tensor of {len(samples)}, but {given} was given"
        )
    return reward.to(torch.float32)
