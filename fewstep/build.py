"""The only file that knows concrete classes: a Config becomes networks, an objective, players and data."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep import conditions, latents, pairs, perception, rewards
from fewstep.conditions import Conditions, Labels, Prompts
from fewstep.config import Config, PairsConfig
from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.times import Step
from fewstep.data.base import checksum
from fewstep.data.loader import Loader
from fewstep.data.pictures import Pictures
from fewstep.data.source import PromptSource, Source, open_source
from fewstep.made import Made, Progress, Tensors
from fewstep.models import attention, loading, offload, schedulers, shaped
from fewstep.models.backbone import Backbone, Guided, Routed
from fewstep.models.codec import Codec
from fewstep.models.codecs import open_codec
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.execution import Execution, execute
from fewstep.models.execution import describe as describe_execution
from fewstep.models.families import CODECS
from fewstep.models.lora import Factors
from fewstep.models.passes import networks_of
from fewstep.objectives import base as objectives
from fewstep.objectives.base import Objective, Triad
from fewstep.rollout import COUNT, Rollout, jumps, transition
from fewstep.store import Store
from fewstep.train import checkpoint, parallel, processes, stored
from fewstep.train.player import Follower, Player, Pull, constant_decay, ema_decay


@dataclass
class Teacher:
    """A loaded network with its process; `scheduler` is the diffusers scheduler the process came from."""

    net: nn.Module
    schedule: NoiseSchedule
    kind: Kind
    scheduler: Any
    null_label: int | None
    shift: float
    codec: Codec | None = None
    unconditional: Condition | None = None
    gained: dict[str, Factors] | None = None
    """what model.lora added to the parts of the pipeline, where a LoRA can say so"""

    def backbone(self, net: nn.Module | None = None) -> DiffusersBackbone:
        return DiffusersBackbone(net or self.net, self.schedule, self.kind, self.null_label, self.unconditional)

    @property
    def prompted(self) -> bool:
        """Whether it reads prompts."""
        return self.codec is not None and self.codec.PROMPTED

    @property
    def even(self) -> bool:
        """Whether its pipeline hands the scheduler even times."""
        return self.codec is not None and self.codec.EVEN_SIGMAS

    @property
    def guides(self) -> bool:
        """Whether it knows what to be without a condition."""
        return self.null_label is not None or self.unconditional is not None


@dataclass
class Run:
    """Everything a run holds while it trains."""

    config: Config
    device: torch.device
    source: Source
    teacher: Teacher
    rollout: Rollout
    triad: Triad
    objective: Objective
    players: dict[str, Player]
    scheduler: Any
    """the stock scheduler to export with the student, None where diffusers has none"""
    shape: tuple[int, ...]
    conditions: Conditions
    maker: Backbone | None = None
    """who makes the pairs, where it is not the teacher: the earlier stage's student, guidance inside"""
    pairs: pairs.Pairs | None = None
    latents: latents.Latents | None = None

    @property
    def at_once(self) -> int:
        """How many samples are made at once outside training, without more memory than training takes."""
        config = self.config
        return config.evals.batch or max(1, config.batch // config.micro_batches // processes.size())

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] as what the networks work on."""
        codec = self.teacher.codec
        return images.to(self.device) if codec is None else codec.encode(images.to(self.device))

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """What the networks make as images (B, 3, H, W), clamped to [-1, 1]."""
        codec = self.teacher.codec
        return (samples if codec is None else codec.decode(samples)).clamp(-1, 1)

    def guided(self) -> Guided:
        """The teacher with its guidance, ready to be asked."""
        guided = Guided(self.teacher.backbone(), self.config.model.guidance).eval()
        offload.place(guided, self.device)
        return guided

    def evaluated(self) -> Backbone:
        """The generator to look at: its average where the run keeps one."""
        player = self.players["generator"]
        follower = player.followers.get("ema")
        return follower.module if follower else self.triad.generator  # type: ignore[return-value]


def pick_device(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU here: use cpu or auto")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device is auto, cpu or cuda, but '{name}' was given")
    return torch.device(name)


def _scheduler(config: Config, loaded: Any | None) -> Any:
    process, kind = config.model.process, config.model.prediction
    if loaded is not None:
        if process is not None:
            raise UserError("the teacher brings its own scheduler: remove model.process")
        return loaded
    if process is None or kind is None:
        raise UserError("this network brings no scheduler: set model.process.name (flow or vp) and model.prediction")
    if process.name == "flow":
        if kind != "flow_prediction":
            raise UserError(f"a flow process goes with model.prediction=flow_prediction, but '{kind}' was given")
        return schedulers.flow_scheduler(config.model.shift or 1.0)
    betas = {k: getattr(process, k) for k in ("beta_schedule", "beta_start", "beta_end")}
    return schedulers.vp_scheduler(kind, {**betas, "rescale_betas_zero_snr": process.zero_terminal_snr})


def _null_label(config: Config, backbone: DiffusersBackbone, labels: int) -> int | None:
    classes = backbone.family.classes(backbone.net)
    if classes is None:
        return None
    if labels == 0:
        raise UserError(
            f"this network wants one of {classes} class labels for every image, but data.source has none: put the "
            "images in sub-folders, one for each label"
        )
    if classes < labels:
        raise UserError(f"the data has {labels} labels, but the network knows only {classes} classes")
    if config.model.null_label is not None:
        if not 0 <= config.model.null_label < classes:
            raise UserError(f"model.null_label is from 0 to {classes - 1}, but {config.model.null_label} was given")
        return config.model.null_label
    return classes - 1 if classes == labels + 1 else None


def build_teacher(
    config: Config,
    labels: int,
    weights: bool = True,
    codecs: Callable[..., Codec] = open_codec,
    buffers: bool = False,
) -> Teacher:
    """The teacher of a run, or the new network that `diffusion` trains; without `weights` only its shape.

    Its `buffers` may be there all the same. `codecs(source, revision)` opens its text encoders and its VAE.
    """
    model = config.model
    if (model.teacher is None) == (model.network is None):
        raise UserError("set either model.teacher (a folder or hub id) or model.network (a new network), not both")
    if model.network is not None:
        loaded = loading.Loaded(loading.new(model.network, weights, buffers), None)
    else:
        loaded = loading.load(str(model.teacher), model.revision, weights, buffers)
    scheduler = _scheduler(config, loaded.scheduler)
    schedule, kind = schedulers.read(scheduler)
    backbone = DiffusersBackbone(loaded.net, schedule, kind)
    null_label = _null_label(config, backbone, labels)
    codec = _codec(config, backbone, codecs)
    gained = _wear(config, codec, loaded.net, weights)
    prompted = codec is not None and codec.PROMPTED
    unconditional = codec.unconditional(model.negative_prompt) if codec is not None and prompted else None
    shift = model.shift or _time_shift(config, codec, scheduler)
    net = loaded.net.float().eval()
    teacher = Teacher(net, schedule, kind, scheduler, null_label, shift, codec, unconditional, gained)
    if model.guidance != 1 and not teacher.guides:
        raise UserError("this teacher has no null class, so it cannot be guided: set model.guidance=1")
    return teacher


def _time_shift(config: Config, codec: Codec | None, scheduler: Any) -> float:
    if codec is None:
        return schedulers.time_shift(scheduler)
    side = config.data.resolution
    return codec.time_shift(scheduler, codec.latent_shape(side, side, config.data.frames))


def _codec(config: Config, backbone: DiffusersBackbone, codecs: Callable[..., Codec]) -> Codec | None:
    """The VAE, and the text encoders of a network that reads prompts. Raises UserError where these are not at hand.

    None for a network on pixels.
    """
    teacher, revision = config.model.teacher, config.model.revision
    latents = teacher is not None and loading.pipeline_class(teacher, revision) in CODECS
    if not backbone.family.prompts and not latents:
        return None
    if teacher is None or (loading.locate(teacher) / "config.json").is_file():
        raise UserError(
            "a network that reads prompts comes with its text encoders: set model.teacher to the folder of its pipeline"
        )
    codec = codecs(teacher, revision)
    if config.model.max_sequence_length is not None:
        codec.give_tokens(config.model.max_sequence_length)
    if config.model.embedded_guidance is not None:
        codec.give_guidance(config.model.embedded_guidance)
    return codec


def _wear(config: Config, codec: Codec | None, net: nn.Module, weights: bool) -> dict[str, Factors] | None:
    """Fuses model.lora into the denoiser and the text encoders. Raises UserError where there is nothing to wear it."""
    if config.model.lora is None:
        return None
    if codec is None:
        raise UserError("model.lora goes onto the pipeline of a network that reads prompts: remove it for this network")
    from fewstep.models import lora_files  # peft, which only adapters need

    if not weights:
        lora_files.find(config.model.lora)
        return None
    return lora_files.fuse(codec.pipeline, net, config.model.lora, config.model.lora_scale)


def _shape(teacher: Teacher, config: Config) -> tuple[int, ...]:
    """The shape of one sample: of pixels, or of latents."""
    resolution = config.data.resolution
    if teacher.codec is not None:
        shape = teacher.codec.latent_shape(resolution, resolution, config.data.frames)
        _refuse_unmatched(teacher, shape[0])
        return shape
    size, channels = teacher.net.config.sample_size, teacher.net.config.in_channels
    if size not in (None, resolution):
        raise UserError(f"the network makes {size}x{size} images, but data.resolution is {resolution}")
    return channels, resolution, resolution


def _refuse_unmatched(teacher: Teacher, channels: int) -> None:
    """Raises UserError where the denoiser, the VAE and the text encoders are not those of one pipeline."""
    family = teacher.backbone().family
    if (taken := family.channels(teacher.net)) != channels:
        raise UserError(
            f"the VAE of this pipeline makes latents of {channels} channels, but its {type(teacher.net).__name__} "
            f"takes {taken}: put the two of one model into model.teacher"
        )
    if not teacher.codec.scaled:  # type: ignore[union-attr]
        raise UserError("the VAE of this pipeline does not say its scale: set scaling_factor in its config.json")
    if family.reads is None:
        return
    reads = teacher.net.config[family.reads]
    given = teacher.unconditional.inputs["encoder_hidden_states"].shape[-1]  # type: ignore[union-attr]
    if given != reads:
        raise UserError(
            f"the text encoders of this pipeline give {given} features a token, but its {type(teacher.net).__name__} "
            f"reads {reads}: put those of one model into model.teacher"
        )


_SCALES = (0.2, 5.0)  # the usual scales are .13 to .18: left out or applied twice they are outside


def _check_scale(run: Run) -> None:
    """Raises UserError where the latents of images are not of the size that networks are trained on."""
    ids = torch.arange(8)
    some = run.encode(run.source.images(ids)) if run.latents is None else run.latents.of(run.latents.visited(ids))
    deviation = some.std().item()
    if not _SCALES[0] < deviation < _SCALES[1]:
        raise UserError(
            f"latents of 8 images of {run.config.data.source} have a deviation of {deviation:.2g}, but networks are "
            f"trained on about 1: the scale in the config.json of the VAE in {run.config.model.teacher} is not that "
            "of its network"
        )


def _check_cache(config: Config, teacher: Teacher, source: Source) -> None:
    """Raises UserError where there are no latents to keep, or some images would never be seen."""
    count = config.data.cache
    if count and teacher.codec is None:
        raise UserError(f"data.cache={count} keeps latents, but this network works on pixels: set data.cache=0")
    if count and source.size not in (None, count):
        raise UserError(
            f"data.cache is 0 or the number of images that {config.data.source} has, {source.size}, "
            f"but {count} was given"
        )


def conditions_of(teacher: Teacher, source: Source, resolution: int) -> Conditions:
    """What the networks are told of the samples of `source`."""
    if teacher.prompted:
        assert teacher.codec is not None
        if isinstance(source, PromptSource | Pictures):
            teacher.codec.refuse_long(list(dict.fromkeys(source.captions(torch.arange(source.epoch or 0)))))
        return Prompts(teacher.codec, source, (resolution, resolution))
    backbone = teacher.backbone()
    return Labels(source, heard=backbone.family.classes(backbone.net) is not None)


def _check_experts(config: Config, rollout: Rollout) -> None:
    count = config.model.experts
    phases = getattr(config.objective, "phases", 1)
    if count not in (1, phases):
        raise UserError(f"model.experts is 1 or the objective's number of phases ({phases}), but {count} was given")
    if len(rollout) % count:
        raise UserError(f"{len(rollout)} steps cannot be shared out to {count} experts: use a multiple")


def _voices(config: Config, roles: tuple[str, ...]) -> dict[str, list[str]]:
    """Role -> the names of its adapters, for the roles that learn one: several where the generator has experts."""
    players = {role: config.players.get(role) for role in roles if role != "real_score"}
    count = {"generator": config.model.experts}
    return {
        role: [role] if count.get(role, 1) == 1 else [f"{role}_expert_{i + 1}" for i in range(count[role])]
        for role, player in players.items()
        if player is not None and player.lora is not None
    }


def _networks(
    config: Config, teacher: Teacher, roles: tuple[str, ...], device: torch.device, idle: tuple[str, ...]
) -> dict[str, list[DiffusersBackbone]]:
    """Role -> its networks: copies of the teacher, or voices of the one teacher that stays frozen below them."""

    earlier = (getattr(config.objective, "target_teacher", None) or "").startswith("previous.")
    like_student = ("generator", "target_score") if earlier else ("generator",)

    def copied(role: str) -> DiffusersBackbone:
        if role in like_student and config.model.student is not None:
            net = _student(config, teacher)
        else:
            net = (shaped.copy_of if role in idle else copy.deepcopy)(teacher.net)
        return teacher.backbone(execute(net, how[role], role in objectives.FROZEN, device))

    voices = _voices(config, roles)
    if "generator" in voices and config.model.student is not None:
        raise UserError("model.student is a network of its own: remove players.generator.lora")
    how = _executions(config, teacher, roles, voices)
    counts = {role: config.model.experts if role == "generator" else 1 for role in roles if role != "real_score"}
    networks = {role: [copied(role) for _ in range(count)] for role, count in counts.items() if role not in voices}
    under = next(iter(voices), "real_score")
    if under in how:
        execute(teacher.net, how[under], True, device)
    bare = teacher.backbone()
    if voices:
        from fewstep.models.voices import Shared  # peft, which only voices need

        specs = {name: config.players[role].lora for role, names in voices.items() for name in names}
        offload.place(bare, device)
        shared = Shared(bare, specs)  # type: ignore[arg-type]
        if how[under].checkpointing:
            shared.enable_gradient_checkpointing()
        networks |= {role: [shared.as_(name) for name in names] for role, names in voices.items()}
        bare = shared.as_(None)
    return networks | ({"real_score": [bare]} if "real_score" in roles else {})


_SHARED = ("in_channels", "out_channels", "sample_size", "num_class_embeds", "cross_attention_dim")
"""what a student of its own shape has in common with its teacher"""


def _student(config: Config, teacher: Teacher) -> nn.Module:
    """The new network that `model.student` describes. Raises UserError where it cannot stand in for the teacher."""
    if config.start.get("generator") == "teacher":
        raise UserError("model.student does not fit the teacher's weights: let start.generator name an earlier run")
    if processes.size() > 1:
        raise UserError("model.student is for one process, since several fill all networks from the teacher's file")
    assert config.model.student is not None
    net = loading.new(config.model.student, not shaped.is_shaped(teacher.net), key="model.student")
    if type(net) is not type(teacher.net):
        raise UserError(f"model.student.class is that of the teacher, {type(teacher.net).__name__}: set it to that")
    for name in _SHARED:
        own, taught = net.config.get(name), teacher.net.config.get(name)
        if own != taught:
            raise UserError(f"model.student.{name} is that of the teacher, {taught}, but {own} was given")
    return net.float().eval()


def _executions(
    config: Config, teacher: Teacher, roles: tuple[str, ...], voices: Mapping[str, Sequence[str]]
) -> dict[str, Execution]:
    """Role -> how its network is executed, the teacher's always among them where there is one. Raises UserError."""
    known = {*roles, "real_score"} if config.model.teacher is not None else {*roles}
    if extra := [role for role in config.model.roles if role not in known]:
        raise UserError(f"model.roles.{extra[0]}: this run has only the networks {', '.join(sorted(known))}")
    how = {role: config.model.execution(role) for role in sorted(known)}
    for role in how:
        _refuse_execution(config, teacher, role, how[role])
    together = [role for role in how if role in voices or role == "real_score"] if voices else []
    if any(how[role] != how[together[0]] for role in together):
        raise UserError(
            f"{' and '.join(together)} are one network with adapters, which is executed in one way, but model.roles "
            "makes them differ: set the same for each, or remove players.<role>.lora"
        )
    return how


def _refuse_execution(config: Config, teacher: Teacher, role: str, how: Execution) -> None:
    """Raises UserError for what the network of `role` cannot do on the device of the run."""
    # A dry run builds on the meta device, and has to answer for the one that is meant.
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    own = config.model.roles.get(role)
    where = "model.attention" if own is None or own.attention is None else f"model.roles.{role}.attention"
    attention.refuse(teacher.net, how.attention, "cuda" if gpu else "cpu", how.dtype, f"{where}={how.attention}")
    if gpu and torch.cuda.is_available():
        _refuse_gpu(teacher, how, f"{where}={how.attention}")
    if how.offload and not gpu:
        raise UserError(f"model.roles.{role}.offload brings weights to a GPU, but this run is on the CPU: remove it")
    if how.offload and processes.size() > 1:
        raise UserError(f"model.roles.{role}.offload is for one process; several share the weights out: remove it")
    if how.offload and any(player.lora is not None for player in config.players.values()):
        raise UserError(f"model.roles.{role}.offload: adapters learn on this network, it has to stay: remove it")


def _refuse_gpu(teacher: Teacher, how: Execution, attended: str) -> None:
    """Raises UserError for what this very GPU cannot do."""
    name = torch.cuda.get_device_name()
    if how.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision=bf16 needs a GPU that computes in bfloat16, which {name} does not: set it to fp32")
    attention.try_out(teacher.net, how.attention, torch.device("cuda"), how.dtype, attended)


def build(config: Config, previous: Path | None = None, idle: tuple[str, ...] = ()) -> Run:
    """Builds a run: networks on the device, their weights from `config.start`, the objective and its players.

    `previous` is the folder of the stage before. The roles in `idle` are only shaped, for a run that does not train.
    Raises UserError for everything a config can get wrong.
    """
    device = pick_device(config.device)
    source = open_source(config.data.source, config.data.resolution, config.data.seed)
    torch.manual_seed(config.seed)
    teacher = build_teacher(config, len(source.labels))
    if teacher.codec is not None:
        teacher.codec.to(device)
    return assemble(config, device, source, teacher, previous, idle)


def assemble(
    config: Config,
    device: torch.device,
    source: Source,
    teacher: Teacher,
    previous: Path | None,
    idle: tuple[str, ...] = (),
) -> Run:
    """The run around a teacher that has been loaded, or only shaped on the meta device: then `start` is left out."""
    _check_cache(config, teacher, source)
    shape = _shape(teacher, config)
    conditions = conditions_of(teacher, source, config.data.resolution)
    scheduler = stock_scheduler(config, teacher)
    steps = schedulers.student_steps(teacher.schedule, scheduler, config.model.steps, teacher.shift, teacher.even)
    kind = objectives.find(config.objective.name).Objective  # type: ignore[attr-defined]
    walk = transition(config.model.transition, config.model.eta)
    count = len(steps) if kind.counts(config.objective) else None
    tells = kind.tells(config.objective)
    twice = kind.two_times(config.objective)
    rollout = Rollout(steps, walk, twice and jumps(walk), count, tells)
    dials = {"generator": [*kind.dials, *tells, *(["to"] if twice else [])], "fake_score": []}
    if count:
        dials = {role: [*own, COUNT] for role, own in dials.items()}
    inputs = torch.zeros(2, *shape), conditions.of(torch.arange(2))

    def wrapped(network: DiffusersBackbone) -> Backbone:
        return kind.wrapped(config.objective, network, *inputs)

    triad = build_triad(config, teacher, kind.needs(config.objective), rollout, device, idle, dials, wrapped)
    networks = [net for net in vars(triad).values() if net is not None]
    if not shaped.is_shaped(*networks_of(*networks)):  # otherwise whoever fills them does that
        start(config, triad, previous)
    objective = kind(config.objective, triad, rollout)
    for term in terms(objective):
        if named := getattr(term.config, "reward", None):
            term.reward = rewards.open_reward(named, source, teacher.codec)  # type: ignore[assignment]
    _check_reads(config, objective, source)
    _check_boundary(config, teacher)
    if not teacher.guides and conditions.of(torch.arange(1)).inputs:
        _check_dropout(objective)
    if config.batch // config.micro_batches % objective.group:
        raise UserError(
            f"objective {config.objective.name} needs {objective.group} samples a group: "  # type: ignore[attr-defined]
            f"make batch / micro_batches a multiple of it, not {config.batch // config.micro_batches}"
        )
    if not idle:  # a run that is only sampled does without
        _lend_features(objective, teacher, source, device)
    with shaped.shapes_of([*networks, *networks_of(*networks)], device) as where:
        objective.attach(*(part.to(where) for part in inputs))
    shaped.place(objective, device)  # what an objective keeps of an idle network is shaped too
    players = build_players(config, triad, objective)
    return Run(config, device, source, teacher, rollout, triad, objective, players, scheduler, shape, conditions)


def _check_boundary(config: Config, teacher: Teacher) -> None:
    name = config.objective.name  # type: ignore[attr-defined]
    if teacher.kind == "sample" and objectives.find(name).Objective.by_derivative(config.objective):
        raise UserError(
            "a network that predicts the sample need not give x back at t = 0, and the derivatives of "
            f"objective {name} do not hold it there: take a teacher that predicts epsilon, v or a flow, or consistency"
        )


def _check_reads(config: Config, objective: Objective, source: Source) -> None:
    """Raises UserError where the objective reads images, a teacher's pairs or labels that this run has not."""
    name, data = config.objective.name, config.data.source  # type: ignore[attr-defined]
    if "x0" in objective.reads and not source.has_images:
        raise UserError(
            f"objective {name} learns from images, but data.source={data} has none: name a folder of images, or see "
            f"in `fewstep objectives {name}` what does without"
        )
    if "pair" in objective.reads and config.model.teacher is None:
        raise UserError(
            f"objective {name} reads pairs that a teacher makes, but model.network is a new network: set "
            "model.teacher, a folder or hub id, in its place"
        )
    for term in terms(objective):
        labels = len(source.labels)
        if labels and getattr(term.config, "parts", 1) > 1 and term.config.labels != labels:
            raise UserError(
                f"objective.labels is the number of labels that data.source={data} has, {labels}, but "
                f"{term.config.labels} was given"
            )


def _check_dropout(objective: Objective) -> None:
    """Raises UserError where a network without a null condition shall now and then be asked without its condition."""
    if any(getattr(term.config, "label_dropout", 0) for term in terms(objective)):
        raise UserError(
            'objective.label_dropout trains without a label now and then, but no class of this network means "no '
            'class": set objective.label_dropout=0 where the objective allows it, or take a network with one class '
            "more than there are labels"
        )


def terms(objective: Objective) -> list[Objective]:
    """The objective and, of a sum, its terms."""
    return [part for part in objective.modules() if isinstance(part, Objective)]


def _lend_features(objective: Objective, teacher: Teacher, source: Source, device: torch.device) -> None:
    """Opens what the objective, or a term of it, compares samples by. Raises UserError where it is not there."""
    decode = teacher.codec.decode if teacher.codec is not None else torch.nn.Identity()
    for part in terms(objective):
        if part.perception is not None:
            weights = getattr(part.config, "lpips", None)
            part.perceive = perception.features(part.perception, weights, source, decode, device)


def build_triad(
    config: Config,
    teacher: Teacher,
    roles: tuple[str, ...],
    rollout: Rollout,
    device: torch.device,
    idle: tuple[str, ...] = (),
    dials: Mapping[str, Sequence[str]] | None = None,
    wrapped: Callable[[DiffusersBackbone], Backbone] = lambda network: network,
) -> Triad:
    """The networks of `roles` in evaluation mode, each a copy of the teacher or a voice of it; some are frozen.

    Those of a role have its `dials`; the generator's are `wrapped`.
    """
    if "real_score" in roles and config.model.teacher is None:
        raise UserError(
            f"objective {config.objective.name} asks a teacher for its score, but "  # type: ignore[attr-defined]
            "model.network is a new network: set model.teacher, a folder or hub id, in its place"
        )
    _check_experts(config, rollout)
    triad: dict[str, Backbone] = {}
    told = dials or {}
    for role, networks in _networks(config, teacher, roles, device, idle).items():
        if role == "generator":
            networks = [wrapped(network) for network in networks]
        for network in networks:
            for dial in told.get(role, ()):
                network.add_dial(dial)  # type: ignore[operator]
            offload.place(network, device)
            network.eval().requires_grad_(role not in objectives.FROZEN)
        length = len(rollout) // len(networks)
        starts = [rollout.steps[i * length].told for i in range(1, len(networks))]
        triad[role] = Routed(networks, starts) if starts else networks[0]
    for role in objectives.FROZEN:
        if role in triad:
            triad[role] = Guided(triad[role], config.model.guidance)
    return Triad(**triad)


def stock_scheduler(config: Config, teacher: Teacher) -> Any | None:
    """The student's scheduler, or None where diffusers has none for its steps."""
    model, even = config.model, teacher.even
    told = (teacher.scheduler, teacher.kind, model.transition, model.steps, teacher.shift, teacher.prompted, even)
    return schedulers.student_scheduler(*told)


def start(config: Config, triad: Triad, previous: Path | None) -> None:
    """Loads the weights that `config.start` names; a role it does not name starts from the teacher.

    A target_score has those of `objective.target_teacher`.
    """
    if triad.target_score is not None:
        where = getattr(config.objective, "target_teacher", None)
        if where is None:
            raise UserError("a term of a sum cannot bring a teacher of its own: make it the objective")
        target: Backbone = triad.target_score.inner  # type: ignore[assignment]
        what = f"objective.target_teacher={where}"
        if where.startswith("previous."):
            load_weights(target, _of_previous(where, previous, what), what)
        else:
            _refuse_process(where, target)
            load_weights(target, stored_in(where, "generator"), what)
    for role, where in config.start.items():
        network = getattr(triad, role, None) if role in ("generator", "fake_score") else None
        if network is None:
            raise UserError(f"start.{role}: this run has no such network; use generator or fake_score")
        if where == "teacher":
            continue
        if where.startswith("previous."):
            state = _of_previous(where, previous, f"start.{role}={where}")
        else:
            state = stored_in(where, role)
        if config.players[role].lora is not None and not any("lora_" in name for name in state):
            raise UserError(
                f"start.{role}={where}: players.{role}.lora learns an adapter on the teacher's weights, but those are "
                f"full weights: make them model.teacher, or remove players.{role}.lora"
            )
        load_weights(network, state, f"start.{role}={where}")


def _of_previous(where: str, previous: Path | None, what: str) -> stored.Stored:
    """The weights of a role of the earlier stage."""
    if previous is None:
        raise UserError(f"{what}: there is no earlier stage")
    return newest(previous, where.removeprefix("previous."))


def _refuse_process(where: str, target: Backbone) -> None:
    """Raises UserError for a target teacher that says of itself that it predicts on another process."""
    if (Path(where) / "checkpoints").is_dir():
        return  # a run of this teacher, or its weights do not fit
    scheduler = loading.load(where, weights=False).scheduler
    schedule, kind = (target.schedule, target.kind) if scheduler is None else schedulers.read(scheduler)
    if kind != target.kind or type(schedule) is not type(target.schedule):
        raise UserError(
            f"objective.target_teacher={where} predicts {kind} on a {type(schedule).__name__} process, but "
            f"model.teacher {target.kind} on a {type(target.schedule).__name__} process: fine-tune that one for the "
            "target"
        )


def stored_in(where: str, role: str) -> stored.Stored:
    """The weights of `role` in a run, or those of a model folder."""
    if (Path(where) / "checkpoints").is_dir():
        return newest(Path(where), role)
    whole = loading.load(where).net.state_dict() if processes.leads() else None
    return stored.from_leader(whole).within("net.")


def load_weights(network: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Strict; a single network starts every expert of a routed one. Raises UserError when they differ."""
    if isinstance(network, Routed) and not any(k.startswith("experts.") for k in state):
        for expert in network.experts:
            load_weights(expert, state, what)
        return
    try:
        checkpoint.fill(network, state)
    except ValueError as error:
        raise UserError(f"{what}: its weights are not those of this network ({error})") from None


def newest(run: Path, role: str) -> stored.Stored:
    """The weights of a role in the newest checkpoint of a run, their average where it keeps one."""
    return checkpoint.steady(lambda: latest(run), lambda path: checkpoint.read_network(path, role, "ema"))


def latest(run: Path) -> Path:
    """The newest checkpoint of a run folder. Raises UserError when there is none."""
    found = checkpoint.available(run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no checkpoint: give the folder of a run that has saved one")
    return found[-1]


def build_players(config: Config, triad: Triad, objective: Objective) -> dict[str, Player]:
    """One player for each role that learns, the objective's own modules joined to it."""
    learns = objective.learns()
    networks = {role: net for role, net in vars(triad).items() if net is not None and role not in objectives.FROZEN}
    wanted = [*networks, *(name for name in learns if name not in networks)]
    for name in config.players:
        if name not in wanted:
            raise UserError(f"players.{name}: this objective has only the players {', '.join(wanted)}")
    players = {}
    for name in wanted:
        if name not in config.players:
            raise UserError(f"players.{name} is missing: set at least players.{name}.lr")
        own = [networks[name]] if name in networks else []
        player = Player(name, [*own, *learns.get(name, [])], config.players[name])
        if player.config.ema:
            player.followers["ema"] = Follower(player.modules[0], ema_decay(player.config.ema))
        players[name] = player
    for label, decay in objective.followers().items():
        law = decay if callable(decay) else constant_decay(decay)
        players["generator"].followers[label] = Follower(triad.generator, law)
        objective.targets[label] = players["generator"].followers[label].module  # type: ignore[assignment]
    for role, decay in objective.drawn().items():
        pull = Pull(networks[role], triad.generator, decay, "objective.critic_average")
        players["generator"].pulls.append(pull)
    return players


def batches(run: Run) -> Callable[[int], list[Batch]]:
    """step -> this process's micro-batches. Sample ids are step * batch + position, however a batch is split."""
    config, reads = run.config, run.objective.reads

    def parts(step: int) -> tuple[torch.Tensor, ...]:
        ids = torch.arange(step * config.batch, (step + 1) * config.batch)
        return processes.share(ids, config.micro_batches * run.objective.group).chunk(config.micro_batches)

    def heads(ids: torch.Tensor) -> torch.Tensor:
        """Where the rows of a group are alike they share one condition and one image: those of its first sample."""
        return ids - ids % run.objective.group if run.objective.alike else ids

    def pictures(number: int) -> torch.Tensor:
        step, part = divmod(number, config.micro_batches)
        return run.source.images(heads(parts(step)[part]))

    images = Loader(pictures, config.data.workers, config.steps * config.micro_batches)

    def at(step: int) -> list[Batch]:
        return [one(ids.to(run.device), step, part) for part, ids in enumerate(parts(step))]

    def one(ids: torch.Tensor, step: int, part: int) -> Batch:
        draw = Draw(config.seed, step, ids)
        rows = heads(ids) if run.latents is None else run.latents.visited(heads(ids))
        return Batch(
            noise=draw.normal("noise", run.shape),
            cond=run.conditions.of(rows),
            draw=draw,
            x0=clean(rows, step * config.micro_batches + part) if "x0" in reads else None,
            pair=run.pairs.of(draw).to(run.device) if run.pairs is not None else None,
        )

    def clean(rows: torch.Tensor, number: int) -> torch.Tensor:
        return run.encode(images(number)) if run.latents is None else run.latents.of(rows)

    return at


def prepare(run: Run, root: Path, previous: Path | None = None) -> None:
    """Gives the run what must be there before the first step: the teacher's pairs and the latents, where it reads them.

    They are found in `data.prepared`; without it, or where the student of the stage before makes them, they are made
    in the run folder `root`, where an interrupted run goes on making them, or those of the stage before are used again
    where they are the same. Raises UserError for a folder `data.prepared` that does not hold them.
    """
    prepared = run.config.data.prepared
    if run.config.pairs.of == "previous" and "pair" in run.objective.reads:
        run.maker = _maker(run, previous)
    for made in to_make(run, texts=prepared is not None):
        if prepared is None or (run.maker is not None and made.unit == "pair"):
            made.take(made.found_or_filled([root, previous]))
        else:
            made.take(made.found(Path(prepared)))
    if run.teacher.codec is not None and "x0" in run.objective.reads:
        _check_scale(run)


def _maker(run: Run, previous: Path | None) -> Backbone:
    """The earlier stage's student, which makes the pairs of this one. Raises UserError where there is none."""
    what = "pairs.of=previous"
    if processes.size() > 1:
        raise UserError(
            f"{what} is for one process: make each round a run of its own, with the last one's export as teacher"
        )
    net = _student(run.config, run.teacher) if run.config.model.student is not None else copy.deepcopy(run.teacher.net)
    maker = run.teacher.backbone(net).eval().requires_grad_(False)
    load_weights(maker, _of_previous("previous.generator", previous, what), what)
    return maker.to(run.device)


def to_make(run: Run, texts: bool) -> list[Made]:
    """What the training of a run reads that can be made before; the encoded `texts` only where asked for."""
    found = []
    if "pair" in run.objective.reads:
        found.append(_pairs(run))
    if run.config.data.cache and "x0" in run.objective.reads:
        found.append(_latents(run))
    if texts and isinstance(run.conditions, Prompts) and (told := _texts(run)):
        found.append(_prompts(run, run.conditions, told))
    return found


def _pairs(run: Run) -> Made:
    config = run.config.pairs

    def take(store: Store) -> None:
        run.pairs = pairs.stored(store.read(), config.seed)
        if run.triad.real_score is None and processes.size() == 1:
            run.teacher.net.to("cpu")  # it has said all it will be asked
        if run.maker is not None:
            run.maker.to("cpu")

    name = f"{'paths' if _passed(run) else 'pairs'}_{config.count}x{config.steps}_seed{config.seed}"
    make = functools.partial(make_pairs, run)
    return Made(name, pairs_recipe(run), config.count, pairs.SHARD, "pair", make, take)


def _passed(run: Run) -> Sequence[Step]:
    """The student's steps at which the objective reads the teacher's states."""
    return run.rollout.steps[1:] if "path" in run.objective.reads else ()


def _latents(run: Run) -> Made:
    data = run.config.data

    def make(rows: torch.Tensor, progress: Progress) -> Tensors:
        return latents.make(run.encode, run.source.images, rows, run.at_once, progress)

    def take(store: Store) -> None:
        run.latents = latents.Latents(store.tensors()["x0"], run.config.seed)

    name = f"latents_{data.cache}_seed{data.seed}"
    return Made(name, latents_recipe(run), data.cache, latents.SHARD, "image", make, take)


def _texts(run: Run) -> list[str]:
    """The captions that the training asks for, each once; none where there is no end of them."""
    cached = "x0" in run.objective.reads and run.config.data.cache
    count = cached or run.source.epoch
    return list(dict.fromkeys(run.source.captions(torch.arange(count)))) if count else []


def _prompts(run: Run, prompts: Prompts, texts: list[str]) -> Made:
    def make(rows: torch.Tensor, progress: Progress) -> Tensors:
        return conditions.make(prompts, [texts[row] for row in rows.tolist()], progress)

    def take(store: Store) -> None:
        prompts.keep(texts, store.tensors())
        prompts.codec.encoders.to("cpu")  # whoever asks for other prompts waits a little longer

    recipe = prompts_recipe(run, texts)
    return Made(f"prompts_{len(texts)}", recipe, len(texts), conditions.SHARD, "prompt", make, take)


def _told_of(config: PairsConfig) -> dict[str, Any]:
    """Of pairs that the teacher makes what was told of them before there were others."""
    return {name: value for name, value in asdict(config).items() if (name, value) != ("of", "teacher")}


def pairs_recipe(run: Run) -> str:
    """Everything that decides what the pairs are."""
    model = run.config.model
    base = [p for name, p in run.teacher.net.named_parameters() if ".lora_" not in name]
    settings = {"guidance": model.guidance, "negative_prompt": model.negative_prompt, "shift": run.teacher.shift}
    if model.lora is not None and run.teacher.codec is not None:
        settings["encoders"] = _sums(run.teacher.codec.encoders.parameters())
    settings["tokens"] = model.max_sequence_length
    if model.embedded_guidance is not None:
        settings["embedded_guidance"] = model.embedded_guidance
    made = {**settings, "weights": _sums(base), "pairs": _told_of(run.config.pairs), "data": _data(run)}
    if run.maker is not None:
        made["maker"] = _sums(run.maker.parameters())
    if passed := _passed(run):
        made["path"] = [step.level for step in passed]
    return json.dumps(made, sort_keys=True)


def latents_recipe(run: Run) -> str:
    """Everything that decides what the latents are."""
    assert run.teacher.codec is not None
    made = {"weights": _sums(run.teacher.codec.pipeline.vae.parameters()), "data": _data(run)}
    return json.dumps(made, sort_keys=True)


def prompts_recipe(run: Run, texts: list[str]) -> str:
    """Everything that decides what the encoded `texts` are."""
    assert run.teacher.codec is not None
    made = {
        "weights": _sums(run.teacher.codec.encoders.parameters()),
        "tokens": run.config.model.max_sequence_length,
        "resolution": run.config.data.resolution,
        "texts": checksum(*(f"{text}\n".encode() for text in texts)),
    }
    return json.dumps(made, sort_keys=True)


def _data(run: Run) -> dict[str, Any]:
    """What decides the samples: the name of a world, or what lies in a folder, wherever that is."""
    found = {**asdict(run.config.data), "checksum": run.source.checksum()}
    apart = {"workers", "prepared", "source" if found["checksum"] else ""}
    return {name: value for name, value in found.items() if name not in apart}


@torch.no_grad()
def _sums(weights: Iterable[torch.Tensor]) -> list[str]:
    """Two sums over weights, rounded, for their last digits differ between thread counts."""
    kept = list(weights)
    sums = (
        sum(parallel.full(f(p.detach().double()).sum()).item() for p in kept)
        for f in (torch.Tensor.abs, torch.Tensor.square)
    )
    return [f"{value:.6e}" for value in sums]


def make_pairs(run: Run, rows: torch.Tensor, progress: Progress) -> Tensors:
    """The guided teacher's deterministic samples from the noises of the consecutive `rows` (N,)."""
    config, teacher = run.config.pairs, run.teacher
    scheduler = schedulers.student_scheduler(teacher.scheduler, teacher.kind, "ode", config.steps, teacher.shift)
    passed, walk = _passed(run), Rollout(schedulers.steps_of(scheduler, config.steps), transition("ode"))
    maker = run.guided() if run.maker is None else run.maker
    args = (maker, pairs.through(walk, passed), run.conditions.afresh, run.shape, len(rows), config.seed)
    kept = [step.level for step in passed]
    made = pairs.make_pairs(*args, run.at_once, progress, run.device, int(rows[0]), kept)
    return pairs.tensors_of(made)


def executed(run: Run) -> list[str]:
    """A line for each role: how its network is executed; then what the objective chose."""
    networks = {role: networks_of(net) for role, net in vars(run.triad).items()}
    lines = [f"{role}: {describe_execution(nets[0])}" for role, nets in networks.items() if nets]
    return [*lines, *run.objective.said]


def describe(config: Config) -> list[str]:
    """Players, parameters, memory and first shapes of a run as lines of text; no weight is read or allocated."""
    source = open_source(config.data.source, config.data.resolution, config.data.seed)
    teacher = build_teacher(config, len(source.labels), weights=False)
    with torch.compiler.set_stance("force_eager"):
        run = assemble(config, torch.device("meta"), source, teacher, None)
    frozen = [p for name, p in teacher.net.named_parameters() if ".lora_" not in name]
    lines = [
        f"objective {config.objective.name}, {len(run.rollout)} step(s), "  # type: ignore[attr-defined]
        f"{type(teacher.schedule).__name__} process, {teacher.kind}"
    ]
    for name, player in run.players.items():
        count = sum(p.numel() for p in player.parameters)
        copies = 4 + len(player.followers)  # weights, gradient, two moments, and each follower
        lines.append(
            f"player {name}: {count:,} parameters, {copies * 4 * count / 2**20:.1f} MB with gradient and optimizer"
        )
    if run.triad.real_score is not None:
        size = sum(p.numel() * p.element_size() for p in frozen)
        lines.append(f"real_score: {sum(p.numel() for p in frozen):,} parameters, frozen, {size / 2**20:.1f} MB")
    lines += executed(run)
    micro = config.batch // config.micro_batches
    reads = ", ".join(run.objective.reads) or "nothing but noise and labels"
    lines.append(
        f"batch: {config.micro_batches} x noise {(micro, *run.shape)}, {len(source.labels)} labels; reads {reads}"
    )
    return lines
