"""Every objective on tiny class-conditional UNets, put together as a run is: for the contract and the golden curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import torch
from oracle import taken
from torch import Tensor, nn

from fewstep import build, rewards
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, vp_from_betas
from fewstep.core.times import Step
from fewstep.models.backbone import Composite, Guided
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.embedders import TimeEmbedder
from fewstep.models.lora import LoraSpec
from fewstep.models.policy import PolicyNet
from fewstep.models.voices import Shared, Voice
from fewstep.objectives import base, consistency, dmd2
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.judged import JudgeConfig
from fewstep.rollout import Rollout, ode, renoise
from fewstep.train.player import Player, PlayerConfig

SMALL, WIDE = ((3, 8, 8), 8), ((1, 16, 16), 16)
"""Image shape and channels of a network. The wide one is like a real one: activations outweigh weights and images."""
LABELS, NULL = 4, 4

PROCESSES: dict[str, tuple[NoiseSchedule, Kind]] = {
    "flow": (Flow(), "flow_prediction"),
    "vp": (vp_from_betas("scaled_linear", 0.00085, 0.012), "epsilon"),
}

GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.5, "ratio": 2}
WHOLE = Exits("last", 2)
RCM_GAP = dmd2.Config(ratio=2, gan_weight=0.0)
# The hinge gives the last bias no gradient while all logits lie in its margin.
JUDGE = JudgeConfig(weight=0.5, loss="softplus", taps=["down_blocks.1", "mid_block"])
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ac_dmd": {"": {"ratio": 2}},
    "align_your_flow": {
        "": {"warmup": 2},
        "told": {"form": "lagrangian", "guidance": [1.0, 3.0]},
    },
    "consistency": {"": {}, "heun-self": {"solver": "heun", "target": "self"}, "training": {"mode": "training"}},
    "ctm": {"": {}, "judged": {"judge": JUDGE, "mode": "distillation"}},
    "ect": {"": {}, "teacher": {"mode": "distillation", "stage_steps": 1}},
    "lcm": {"": {}, "lora": {"embed": False, "target": "self"}},
    "pcm": {"": {"judge": JUDGE}, "plain": {}},
    "rcm": {
        "": {"matching": RCM_GAP, "warmup": 1},
        "gan": {"matching": dmd2.Config(**GAN), "warmup": 0},
        "grid": {"matching": RCM_GAP, "discrete": consistency.Config(), "warmup": 1},
    },
    "sana_sprint": {"": {"gan_loss": "softplus", "gan_taps": ["down_blocks.1", "mid_block"], "warmup": 0}},
    "scm": {"": {}, "training": {"mode": "training", "warmup": 0, "adaptive": False}},
    "tbcm": {"": {"states": 3, "warmup": 0}},
    "arcflow": {"": {"modes": 3, "hidden": 4, "mixing": 2}},
    "agd": {"": {"route": 2}},
    "progressive": {"": {}, "later": {"target_teacher": "given"}},
    "perflow": {"": {"solver_steps": 2}},
    "rf_plus_plus": {"": {"perceptual": 0.0}},
    "slimflow": {"": {"anneal": 2}, "distill": {"phase": "distill", "target_teacher": "given"}},
    "tcd": {"": {}, "twice": {"second_time": True}},
    "tcm": {"": {"target_teacher": "given", "stage_steps": 1}},
    "tscd": {"": {"segments": 3, "judge": JUDGE}, "plain": {"segments": 2, "target": "self"}},
    "dmd": {"": {}, "free": {"regression": 0.0, "ratio": 2}, "whole": {"exits": WHOLE}},
    "disback": {"": {**GAN, "ratio": 1, "snapshots": 1, "record": 1, "interval": 2}},
    "dmd2": {
        "": GAN,
        "teacher": {**GAN, "gan_features": "teacher"},
        "data": {**GAN, "backward_simulation": False},
        "free": {"gan_weight": 0.0, "ratio": 2},
        "whole": {**GAN, "exits": WHOLE, "regression": 0.5},
        "smooth": {**GAN, "gan_r1": 10.0, "gan_taps": ["down_blocks.1", "mid_block"]},
    },
    "f_distill": {
        "": GAN,
        "covering": {**GAN, "divergence": "forward_kl", "bin_decay": 0.5},
    },
    "freeflow": {"": {}, "predict": {"correct": 0.0}},
    "mdt_dist": {"": {}, "own": {"matching": 0.0}, "moved": {"distillation": 0.0, "normalise": True}},
    "msd": {"": {**GAN, "parts": 2, "labels": LABELS}},
    "phased_dmd": {"": {"ratio": 2}},
    "reward": {"": {"reward": "tiny:brightness"}},
    "rectified_flow": {
        "": {},
        "distill": {"phase": "distill"},
        "paths": {"phase": "distill", "states": "teacher"},
    },
    "shortcut": {"": {"bootstrap": 0.5}, "training": {"mode": "training", "bootstrap": 1.0}},
    "sid": {"": {}, "plain": {"alpha": 0.5, "weight": "none", "ratio": 2}},
    "sida": {"": {"gan_weight": 0.5, "gan_critic_weight": 0.5}},
    "snoopi": {"": {"label_dropout": 0.5}},
    "swiftbrush": {"": {"label_dropout": 0.5}},
    "flash_dmd": {
        "": {**GAN, "split": 1.0, "gan_start": 2},
        "gap": {"gan_weight": 0.0, "split": 0.0},
        "own": {**GAN, "split": 1.0, "gan_start": 2, "critic_average": 1.0},
    },
    "ladd": {"": {"gan_loss": "softplus", "ratio": 2, "gan_taps": ["down_blocks.1", "mid_block"], "gan_r1": 10.0}},
    "re_dmd": {"": {"reward": "tiny:brightness", "ratio": 2}, "gan": {**GAN, "reward": "tiny:brightness"}},
    "tmd": {"": {**GAN}, "flow": {"stage": "flow"}},
    "tdm": {"": {}, "bridge": {"critic_target": "bridge", "huber": 0.0, "ratio": 2}, "counts": {"counts": [1, 2]}},
    "twinflow": {"": {}, "any": {"ends": "any"}},
    "uni_dad": {
        "": {**GAN, "target_teacher": "given", "target_share": 0.5, "gan_taps": ["down_blocks.1", "mid_block"]}
    },
    "sum": {"": {"terms": [{"name": "dmd", "ratio": 2, "regression": 0.5}, {"name": "dmd2", "scale": 0.5, **GAN}]}},
}
"""Objective -> its variants by name. An objective that is not named here is tried with its defaults."""

OF_THE_FLOW = [
    "align_your_flow",
    "arcflow",
    "boot",
    "ctm",
    "ctm-judged",
    "dmd",
    "dmd2-whole",
    "freeflow",
    "imm",
    "meanflow",
    "paired",
    "pcm",
    "pcm-plain",
    "perflow",
    "progressive",
    "progressive-later",
    "shortcut",
    "sum",
    "tcd-twice",
    "tdm",
    "twinflow-any",
]
TRANSITIONS = dict.fromkeys(OF_THE_FLOW, ode)
"""Of objectives, or variants of them, that ask for one of their own; the others renoise."""

ONLY = {"arcflow": ["flow"], "tmd": ["flow"], "twinflow": ["flow"]}
"""Objectives that are for some processes alone."""

ONE_STEP = ("boot", "freeflow")
"""Objectives of students that have no further step; the others are tried with two."""

WHOLE_GRAPH = ("tmd",)
"""Objectives that refuse gradient checkpointing of the generator."""

CASES = [
    f"{name}{'-' if variant else ''}{variant}/{process}"
    for name in base.names()
    for variant in VARIANTS.get(name, {"": {}})
    for process in ONLY.get(name, PROCESSES)
]


def brightness(images: Tensor, cond: Condition) -> Tensor:
    return images.flatten(1).mean(1)


def unet(seed: int, shape: tuple[int, int, int], channels: int) -> nn.Module:
    """A random UNet2DModel with 4 classes and a null class; 27 thousand weights where it is small."""
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=[channels, channels],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=LABELS + 1,
    ).eval()


Roles = Literal["full", "lora", "shared"]
"""How the roles learn: whole networks, an adapter each on networks of their own, or adapters on one network."""


def voices(net: DiffusersBackbone, checkpointed: bool) -> Shared:
    """`net` with a voice a role, each of which already says something of its own."""
    shared = Shared(net, {role: LoraSpec(2, 2.0, ["*"]) for role in ("generator", "fake_score")})
    if checkpointed:
        shared.enable_gradient_checkpointing()
    torch.manual_seed(6)
    for name, weight in net.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.05)
    return shared


@dataclass
class Tiny:
    objective: Objective
    players: dict[str, Player]
    shape: tuple[int, int, int]

    def networks(self) -> dict[str, nn.Module]:
        """Everything that has weights; `own` are the objective's modules."""
        triad = self.objective.triad
        return {**{name: net for name, net in vars(triad).items() if net is not None}, "own": self.objective}

    def weights(self) -> dict[str, nn.Parameter]:
        return {f"{role}.{name}": p for role, net in self.networks().items() for name, p in net.named_parameters()}

    def base_weights(self) -> list[nn.Parameter]:
        """The weights below the voices, which nobody trains."""
        bare = [net.inner if isinstance(net, Composite) else net for net in self.networks().values()]
        networks = [net.shared.backbone for net in bare if isinstance(net, Voice)]
        return [p for net in networks for name, p in net.named_parameters() if ".lora_" not in name]

    def of_player(self, name: str) -> set[str]:
        """The names of the weights that move with a player."""
        mine = {id(p) for p in self.players[name].parameters}
        return {weight for weight, p in self.weights().items() if id(p) in mine}


def make(
    case: str, player: PlayerConfig, checkpointed: bool = False, sizes: Any = SMALL, learn: Roles = "full"
) -> Tiny:
    """The run of a case such as dmd2-teacher/vp, with gradient checkpointing in every UNet or without."""
    told, process = case.split("/")
    name, _, variant = told.partition("-")
    schedule, kind = PROCESSES[process]
    checkpointed = checkpointed and name not in WHOLE_GRAPH

    def plain(seed: int) -> DiffusersBackbone:
        net = unet(seed, *sizes)
        if checkpointed:
            net.enable_gradient_checkpointing()
        return DiffusersBackbone(net, schedule, kind, NULL)

    one = voices(plain(0), checkpointed) if learn == "shared" else None

    def network(seed: int, role: str | None) -> DiffusersBackbone:
        if learn == "full":
            return plain(seed)
        return (one or voices(plain(seed), checkpointed)).as_(role)

    module = base.find(name)
    config = module.Config(**VARIANTS.get(name, {"": {}})[variant])
    roles = module.Objective.needs(config)
    networks: dict[str, Any] = {"generator": network(1, "generator")}
    torch.manual_seed(7)
    counts = ["steps"] if module.Objective.counts(config) else []
    tells, two_times = module.Objective.tells(config), module.Objective.two_times(config)
    for dial in (*module.Objective.dials, *tells, *(["to"] if two_times else []), *counts):
        networks["generator"].add_dial(dial)
    inputs = torch.zeros(2, *sizes[0]), Condition({"class_labels": torch.zeros(2, dtype=torch.int64)})
    bare = networks["generator"]
    networks["generator"] = module.Objective.wrapped(config, bare, *inputs)
    if isinstance(networks["generator"], PolicyNet):
        nn.init.normal_(networks["generator"].layers[-1].weight, std=0.05)
    for embedder in bare.dials.values():
        nn.init.normal_(embedder.layers[-1].weight, std=0.05)
    if "target_score" in roles:
        networks["target_score"] = Guided(plain(4), 1.5).requires_grad_(False)
    if "real_score" in roles:
        networks["real_score"] = Guided(network(0, None), 1.5).requires_grad_(False)
    if "fake_score" in roles:
        networks["fake_score"] = network(2, "fake_score")
        for dial in counts:
            networks["fake_score"].add_dial(dial)
            nn.init.normal_(networks["fake_score"].dials[dial].layers[-1].weight, std=0.05)
    transition = TRANSITIONS.get(told) or TRANSITIONS.get(name, renoise)
    steps = [Step(1.0, 1.0), Step(0.5, 0.5)][: 1 if name in ONE_STEP else 2]
    rollout = Rollout(steps, transition, two_times, len(steps) if counts else None, tells)
    objective = module.Objective(config, Triad(**networks), rollout)
    if named := getattr(config, "reward", None):
        objective.reward = rewards.own(named)
    torch.manual_seed(3)
    objective.attach(*inputs)
    for embedder in objective.modules():
        if isinstance(embedder, TimeEmbedder):  # silent at the start
            nn.init.normal_(embedder.layers[-1].weight, std=0.05)
    configs = {name: player for name in {**networks, **objective.learns()} if name not in base.FROZEN}
    players = build.build_players(SimpleNamespace(players=configs), objective.triad, objective)  # type: ignore[arg-type]
    return Tiny(objective, players, sizes[0])


def batch(tiny: Tiny, step: int, ids: Tensor) -> Batch:
    """Only what the objective says it reads is there; the samples of a group that is alike share condition and data."""
    draw, shape, reads = Draw(5, step, ids), tiny.shape, tiny.objective.reads
    group = tiny.objective.group if tiny.objective.alike else 1
    first = ids - ids % group
    cond = Condition({"class_labels": first // group % LABELS})
    images = 0.5 * Draw(5, step, first).normal("images", shape)
    path = draw.normal("path", (1, *shape)) if "path" in reads else None
    stored = Pair(draw.normal("stored", shape), 0.5 * draw.normal("made", shape), cond, path)
    return Batch(
        draw.normal("noise", shape),
        cond,
        draw,
        x0=images if "x0" in reads else None,
        pair=stored if "pair" in reads else None,
    )


def batches(tiny: Tiny, step: int, size: int, parts: int = 1) -> list[Batch]:
    """`size` samples, or groups of them, in `parts` micro-batches."""
    size *= tiny.objective.group
    ids = torch.arange(step * size, (step + 1) * size)
    return [batch(tiny, step, part) for part in ids.chunk(parts)]


def turns(tiny: Tiny, step: int, size: int = 4) -> Iterator[Turn]:
    """The turns of one step on one micro-batch; what it asks to share is its own."""
    return taken(tiny.objective.turns(batches(tiny, step, size)[0], step))
