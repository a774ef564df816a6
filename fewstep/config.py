"""Typed configuration: dataclass schema <- YAML <- key=value, then plain dataclass objects."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewstep import reading
from fewstep.core.errors import UserError, sentence
from fewstep.core.prediction import Kind
from fewstep.models.attention import Attention
from fewstep.models.execution import Execution
from fewstep.models.precision import Precision
from fewstep.objectives import base as objectives
from fewstep.rollout import TransitionName
from fewstep.train.player import PlayerConfig

FEWEST_SAMPLES = 24
MANY_STEPS = 50


@dataclass
class ProcessConfig:
    """The forward process of a network that does not bring its scheduler."""

    name: Literal["flow", "vp"] = "flow"
    """flow: x_t = (1 - t) x0 + t eps; vp: variance preserving, from betas"""
    beta_schedule: str = "scaled_linear"
    """linear | scaled_linear | squaredcos_cap_v2, as diffusers names them"""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    """rescale the betas so that the last level is pure noise (needs v or x0 prediction)"""


ROLES = ("generator", "real_score", "fake_score")


@dataclass
class RoleConfig:
    """How one network is executed, where it differs from what `model` says; null takes what `model` says."""

    attention: Attention | None = None
    """sdpa | math | flash | xformers | flex"""
    precision: Precision | None = None
    """fp32 | bf16"""
    checkpointing: bool | None = None
    """recompute activations in the backward pass"""
    compile: bool | None = None
    """torch.compile of the repeated blocks"""
    offload: bool = False
    """real_score only: its weights lie in host memory and visit the GPU block by block"""


@dataclass
class ModelConfig:
    teacher: str | None = None
    """pipeline folder, bare diffusers model folder (then set process and prediction), or hub id"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""
    lora: str | None = None
    """a LoRA that the teacher wears: .safetensors file, folder that holds one, or hub id; fused before anything else"""
    lora_scale: float = 1.0
    """how strongly"""
    network: dict[str, Any] | None = None
    """instead of a teacher, a new network: `class` and the arguments of that diffusers class"""
    student: dict[str, Any] | None = None
    """a new network for the generator, of the teacher's class, instead of a copy of it: `class` and arguments"""
    process: ProcessConfig | None = None
    """forward process; needed without a scheduler, refused with one"""
    prediction: Kind | None = None
    """epsilon | sample | v_prediction | flow_prediction; needed without a scheduler"""
    null_label: int | None = None
    """label that means "no class"; default: the last embedding when there is one more than labels"""
    max_sequence_length: int | None = None
    embedded_guidance: float | None = None
    """tokens of the last text encoder, where the pipeline's call can be asked for it; default: as that call"""
    negative_prompt: str = ""
    """what guidance leads away from, for networks that read prompts"""
    guidance: float = 1.0
    """teacher guidance w in u + w (c - u); 1 = none"""
    steps: int = 1
    """network passes of the student, usually 1 to 8; 50 by default where `diffusion` trains a many-step model"""
    transition: TransitionName = "ode"
    """between the student's steps: renoise (SDE) | ode | cps | gamma"""
    eta: float = 0.5
    """share of fresh noise of cps and gamma"""
    shift: float | None = None
    """moves the student's times towards noise (> 1), flow models only; default: what the teacher's scheduler does"""
    experts: int = 1
    """networks of the generator, one for each phase of the steps; 1 = one shared network"""
    attention: Attention = "sdpa"
    """kernel of the attention: sdpa (torch picks one) | math (any device, also forward derivatives) | flash (GPU and
    bf16) | xformers (GPU) | flex (GPU)"""
    precision: Precision = "fp32"
    """fp32 | bf16: what networks compute in. Learned weights, optimizers, averages and losses stay float32; the weights
    of a frozen network, the teacher's or those below adapters, are kept in bf16: half the memory"""
    checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the repeated blocks: minutes at the start, then faster steps"""
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    """generator | real_score (the teacher) | fake_score -> what differs for its network"""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UserError(f"model.steps is a number of network passes from 1 to 1000, but {self.steps} was given")
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"model.shift is a factor above 0, but {self.shift} was given")
        if not 0 <= self.eta <= 1:
            raise UserError(f"model.eta is a share from 0 to 1, but {self.eta} was given")
        if not math.isfinite(self.lora_scale) or (self.lora_scale != 1 and self.lora is None):
            raise UserError(
                f"model.lora_scale is the strength of model.lora, but {self.lora_scale} was given without one"
            )
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"model.guidance is a number from 0, 1 for none, but {self.guidance} was given")
        for role, own in self.roles.items():
            if role not in ROLES:
                raise UserError(f"model.roles has {', '.join(ROLES)}, but {role} was given")
            if own.offload and role != "real_score":
                raise UserError(f"model.roles.{role}.offload: only real_score, which is frozen, can be put away")

    def execution(self, role: str) -> Execution:
        """How the network of `role` is executed."""
        own = self.roles.get(role, RoleConfig())
        names = [part.name for part in fields(RoleConfig) if part.name != "offload"]
        chosen = {name: getattr(self if getattr(own, name) is None else own, name) for name in names}
        return Execution(**chosen, offload=own.offload)


@dataclass
class DataConfig:
    source: str = "scenes"
    """scenes | captioned | noise | a .txt file with a prompt a line | a folder of images: sub-folders are labels, text
    files or captions.jsonl beside the images captions | WebDataset shards (.tar, their folder or a pattern) | a folder
    that the datasets library has saved. Pictures are cropped to the square in the middle and resized"""
    resolution: int = 16
    """height and width in pixels"""
    frames: int | None = None
    """of a video model: a multiple of its time compression, and one"""
    seed: int = 1
    """seed of the scenes"""
    cache: int = 0
    """images encoded once, before training, and then visited again and again; 0 encodes new ones at every step"""
    workers: int = 0
    """threads that decode the next batches during a step; the order and the bytes are the same for any number"""
    prepared: str | None = None
    """a folder that `fewstep prepare` has filled for this config: latents, encoded prompts and teacher pairs"""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"data.workers is a number of threads, 0 for none, but {self.workers} was given")
        if self.cache < 0:
            raise UserError(f"data.cache is a number of images, 0 for none, but {self.cache} was given")


@dataclass
class HookConfig:
    metric: str = MISSING
    """frechet | kernel | neighbours | clip_score | prompt_diversity | teacher_distance"""
    every: int = 1000
    """steps between measurements; the last step is measured too"""
    samples: int = 1000
    """images it is made of"""
    network: Literal["follower", "raw"] = "follower"
    """the generator's average, where one is kept, or its weights as they are"""
    extractor: str = "reader"
    """reader | inception | clip | dinov2"""
    weights: str | None = None
    """file or folder of the extractor's weights; default: the reader, or the CLIP, of the scenes"""
    model: str | None = None
    """architecture of open_clip that a file of CLIP weights is of, such as ViT-B-32"""
    reference: str | None = None
    """folder of real images, or an .npz of their statistics; default: data.source"""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"evals.hooks: every is a number of steps from 1, but {self.every} was given")
        if self.samples < FEWEST_SAMPLES:
            raise UserError(f"evals.hooks: samples is at least {FEWEST_SAMPLES}, but {self.samples} was given")


@dataclass
class EvalConfig:
    every: int = 200
    """steps between sample grids; 0 = none"""
    measure_every: int = 0
    """steps between measurements of the student; 0 = only at the end"""
    samples: int = 2000
    """images measured at the end; 0 = no table"""
    batch: int | None = None
    """images made at once where they are seen or measured; default: as many as a process trains on at once"""
    baseline: bool = True
    """also measure the undistilled teacher at the student's step count"""
    hooks: dict[str, HookConfig] = field(default_factory=dict)
    """name -> a metric that is measured during training"""
    best: str | None = None
    """the hook whose best checkpoint is kept; of a hook with several numbers one of them, as in near/coverage"""

    def __post_init__(self) -> None:
        if self.best is not None and self.best.split("/")[0] not in self.hooks:
            names = ", ".join(self.hooks) or "none"
            raise UserError(f"evals.best names one of evals.hooks ({names}), but '{self.best}' was given")
        check_samples("evals.samples", self.samples)
        if self.batch is not None and self.batch < 1:
            raise UserError(f"evals.batch is a number of images from 1, but {self.batch} was given")
        if self.every < 0 or self.measure_every < 0:
            raise UserError("evals.every and evals.measure_every are numbers of steps, 0 for never")


def check_samples(what: str, count: int) -> None:
    """Raises UserError for a number of images that no table can be made of: neighbours and labels need some."""
    if count != 0 and count < FEWEST_SAMPLES:
        raise UserError(f"{what} is 0 for no table, or at least {FEWEST_SAMPLES} images, but {count} was given")


@dataclass
class SaveConfig:
    every: int = 500
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints kept"""
    export: bool = True
    """write the diffusers pipeline folder at the end"""
    grace: float = 30.0
    """seconds that SIGTERM or Ctrl-C leaves for the step that is played and its checkpoint: where both have taken
    longer than that, the run says so"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError(f"save.every and save.keep are at least 1, but {self.every} and {self.keep} were given")
        if not self.grace > 0:
            raise UserError(f"save.grace is a number of seconds above 0, but {self.grace} was given")


@dataclass
class PairsConfig:
    count: int = 2000
    """teacher pairs made before training, for objectives that read them"""
    steps: int = 24
    """teacher steps for each pair"""
    seed: int = 7
    """seed of the pairs' noise and labels"""
    of: Literal["teacher", "previous"] = "teacher"
    """who makes them: the guided teacher, or the earlier stage's student (another round of reflow)"""

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise UserError(f"pairs.count and pairs.steps are at least 1, but {self.count} and {self.steps} were given")


@dataclass
class Config:
    """One run, or one stage of a run."""

    name: str = MISSING
    """the run folder is runs/<date>_<name>"""
    seed: int = 0
    steps: int = 1000
    """calls of the objective's turns"""
    batch: int = 64
    """samples a step, over all micro-batches"""
    micro_batches: int = 1
    """parts a batch is split into, to save memory"""
    device: str = "auto"
    """auto | cpu | cuda"""
    timeout: float = 600.0
    """seconds after which the processes of a run stop where one of them is lost, or does not come where the others
    wait: more than the leader takes for the longest thing it does alone, such as writing a checkpoint"""
    model: ModelConfig = field(default_factory=ModelConfig)
    start: dict[str, str] = field(default_factory=dict)
    """role -> where its weights start: teacher | previous.generator | previous.fake_score | a run or model folder"""
    objective: dict[str, Any] = field(default_factory=dict)
    """name and its own keys: see `fewstep objectives`"""
    players: dict[str, PlayerConfig] = field(default_factory=dict)
    """generator and, where there is one, fake_score"""
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """each stage is this config with these keys laid over it; stages run one after the other"""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.micro_batches < 1:
            raise UserError("steps, batch and micro_batches are at least 1")
        if not self.timeout >= 1:
            raise UserError(f"timeout is a number of seconds of at least 1, but {self.timeout} was given")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"name becomes part of a folder's name: use letters, digits, . - and _, not '{self.name}'")
        if self.batch % self.micro_batches:
            raise UserError(f"batch {self.batch} cannot be split into {self.micro_batches} equal micro_batches")


_MOST_STAGES = 100


def _read(path: Path) -> DictConfig:
    if not reading.there(path) or not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:8]) if path.parent.is_dir() else ""
        raise UserError(f"there is no config file {path}" + (f": the folder has {near}" if near else ""))
    loaded = OmegaConf.create(reading.settings(path))
    if "base" in loaded:
        if not isinstance(base := loaded.pop("base"), str):
            raise UserError(f"{path}: base is the name of another config file, but {base} was given")
        below = _read(path.parent / base)
        if "base" in below:
            raise UserError(f"{path}: the base of a config has no base of its own")
        loaded = _overlay(below, loaded)
    return loaded


def _overlay(below: DictConfig, above: DictConfig) -> DictConfig:
    """`above` over `below`; a different objective replaces the whole objective node."""
    below = copy.deepcopy(below)
    old, new = below.get("objective"), above.get("objective")
    if old and new and "name" in new and new["name"] != old.get("name"):
        del below["objective"]
    merged = OmegaConf.merge(below, above)
    assert isinstance(merged, DictConfig)
    return merged


def load(path: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """The stages of a config file with `key=value` overrides laid over them; one Config where it names no stages.

    An override reaches every stage; `stage_2.key=value` only the second. `stages=[]` plays the rest as one stage.
    Raises UserError with one sentence for an unknown key, a wrong type or contradictory values.
    """
    given = _read(Path(path))
    everywhere, apart = _split(overrides)
    stages = everywhere.pop("stages", given.pop("stages", None)) or [{}]
    if isinstance(stages, DictConfig):
        raise UserError("stages is a list: override a key of one stage by stage_1.key=value")
    if not all(isinstance(stage, dict | DictConfig) for stage in stages) or len(stages) > _MOST_STAGES:
        raise UserError(f"{path}: stages is a list of at most {_MOST_STAGES} groups of keys, one for each stage")
    if beyond := [name for name in apart if not 1 <= int(name.removeprefix("stage_")) <= len(stages)]:
        raise UserError(f"the config has {len(stages)} stage(s), but {beyond[0]} was given")
    configs = []
    for i, stage in enumerate(stages, 1):
        layers = (OmegaConf.create(stage), everywhere, apart.get(f"stage_{i}", OmegaConf.create()))
        try:
            configs.append(_typed(reduce(_overlay, layers, given)))
        except UserError as error:
            if len(stages) == 1:
                raise
            hint = f" (stage_{i}.key=value overrides a key of this stage alone)" if everywhere else ""
            raise UserError(f"stage {i} of {len(stages)}: {error}{hint}") from None
    return configs


def _split(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, DictConfig]]:
    """What holds for every stage, and what `stage_<number>.` keeps to one."""
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}' is not an override: write key=value, such as model.steps=4")
        if "${" in override:
            raise UserError(f"'{override}' holds ${{..}}: write the value out")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise UserError(sentence(error)) from None
    names = [str(name) for name in given if re.fullmatch(r"stage_\d+", str(name))]
    return given, {name: given.pop(name) for name in names}


def _typed(given: DictConfig) -> Config:
    if not given.get("name"):
        raise UserError("the config has no name: add a line such as name: my_run")
    node = given.get("objective") or {}
    if isinstance(node, str):
        raise UserError(f"objective has keys of its own: write objective.name={node}")
    if "model" in given and not isinstance(given["model"], DictConfig):
        raise UserError("model has keys of its own, such as model.teacher and model.steps")
    if "name" not in node:
        raise UserError(f"objective.name is missing: use one of {', '.join(objectives.names())}")
    objective = objectives.typed(node)
    if node["name"] == "diffusion":
        given = _overlay(OmegaConf.create({"model": {"steps": MANY_STEPS}}), given)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), {k: v for k, v in given.items() if k != "objective"})
        config = OmegaConf.to_object(typed)
        assert isinstance(config, Config)
    except OmegaConfBaseException as error:
        raise UserError(sentence(error)) from None
    config.objective = objective
    return config


def to_yaml(config: Config) -> str:
    """The complete resolved config; loading it gives the same Config."""
    objective = OmegaConf.structured(config.objective)
    plain = copy.copy(config)
    plain.objective = {}
    container = OmegaConf.to_container(OmegaConf.structured(plain))
    assert isinstance(container, dict)
    container["objective"] = OmegaConf.to_container(objective)
    return OmegaConf.to_yaml(OmegaConf.create(container))


def differences(before: str, now: str) -> dict[str, str]:
    """What two complete configs, as `to_yaml` writes them, do not agree on: key -> "was .., is .."."""
    old, new = (_flat(reading.settings_in(text)) for text in (before, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    said = lambda value: reading.shown(str(value), 300)
    return {key: f"{said(key)} was {said(old.get(key))}, is {said(new.get(key))}" for key in keys}


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {k: v for name, part in node.items() for k, v in _flat(part, f"{path}.{name}" if path else name).items()}


def describe_objectives(name: str | None) -> str:
    """A line for each objective, or the keys of one as commented YAML."""
    if name is None:
        lines = [(n, (objectives.find(n).__doc__ or "").strip().splitlines()[0]) for n in objectives.names()]
        return "\n".join(f"{n:16} {line}" for n, line in lines)
    module = objectives.find(name)
    default = OmegaConf.to_container(OmegaConf.structured(module.Config))
    assert isinstance(default, dict)
    said = comments(module.Config)
    rows = []
    for key, value in default.items():
        rows += ([f"# {said[key]}"] if key in said else []) + [f"{key!s}: {inline(value)}"]
    return f"{(module.__doc__ or '').strip()}\n\n" + "\n".join(rows)


def inline(value: Any) -> str:
    """A value of a config on one line, as YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def comments(schema: type) -> dict[str, str]:
    """Field -> the string below it in the source of a config dataclass, or of one that it extends."""
    found = {}
    for kind in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field_node, comment in itertools.pairwise(body):
            if isinstance(field_node, ast.AnnAssign) and isinstance(comment, ast.Expr):
                found[field_node.target.id] = ast.literal_eval(comment.value)  # type: ignore[union-attr]
    return found
