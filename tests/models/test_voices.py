from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided, frozen
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.lora import LoraSpec
from fewstep.models.passes import PassCounter, networks_of
from fewstep.models.voices import Shared, Voice
from fewstep.train import checkpoint
from fewstep.train.player import Follower, Player, PlayerConfig, constant_decay

Make = Callable[..., nn.Module]
COND = Condition({"class_labels": torch.tensor([0, 3])})
T = torch.tensor([0.3, 0.8])
TARGETS = {"unet": ["to_q", "to_out.0", "conv1", "time_emb_proj"], "dit": ["attn1.*", "net.0.proj", "linear_1"]}
# (rows + columns) * rank over the targets above: the weights of an adapter of rank 2.
SIZES = {"unet": 2752, "dit": 1472}


@pytest.fixture(params=["unet", "dit"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def plain(family: str, tiny_unet: Make, tiny_dit: Make) -> Callable[[], DiffusersBackbone]:
    """Makes the same frozen network every time, without the zeros a DiT starts with."""

    def make() -> DiffusersBackbone:
        net = {"unet": tiny_unet, "dit": tiny_dit}[family]().requires_grad_(False)
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.2)
        return DiffusersBackbone(net, Flow(), "flow_prediction", null_label=4)

    return make


@pytest.fixture
def shared(plain: Callable[[], DiffusersBackbone], family: str) -> Shared:
    """A generator and a critic on `plain`, at their silent start."""
    return Shared(plain().train(), {name: LoraSpec(2, 6.0, TARGETS[family]) for name in ("generator", "critic")})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def speak_up(*voices: Voice) -> None:
    """B leaves zero, differently for every voice."""
    for i, voice in enumerate(voices):
        torch.manual_seed(10 + i)
        for p in voice.parameters():
            nn.init.normal_(p, std=0.3)


def say(net: nn.Module, x: Tensor, **changes: Any) -> Tensor:
    with torch.no_grad():
        return net(x, T, COND, **changes).value


def halves(voice: Voice) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(target, A, B) of every layer of a voice."""
    state = voice.state_dict()
    for name in (name for name in state if name.endswith("lora_A.weight")):
        yield (
            name.removeprefix("adapter.").removesuffix(".lora_A.weight"),
            state[name],
            state[name.replace("lora_A", "lora_B")],
        )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_bare_and_fresh_voices_say_what_the_network_says(
    shared: Shared, plain: Callable[[], DiffusersBackbone], x: Tensor
) -> None:
    """Bit for bit, values and features; so does the network itself while nobody speaks."""
    before = plain()
    tap = before.tap
    expected = before(x, T, COND, taps=(tap,))
    assert not any(module.training for module in shared.backbone.modules())
    for voice in (None, "generator", "critic"):
        with torch.no_grad():
            said = shared.as_(voice)(x, T, COND, taps=(tap,))
        assert torch.equal(said.value, expected.value) and torch.equal(said.features[tap], expected.features[tap])
    assert torch.equal(shared.backbone(x, T, COND).value, expected.value)
    speak_up(shared.as_("critic"))
    assert torch.equal(say(shared.as_(None), x), expected.value)
    assert torch.equal(say(shared.as_("generator"), x), expected.value)
    assert (say(shared.as_("critic"), x) - expected.value).abs().max() > 0.1


def test_a_voice_adds_b_times_a_to_the_weights(
    shared: Shared, plain: Callable[[], DiffusersBackbone], x: Tensor
) -> None:
    """W + (alpha / rank) B A written into the plain network: matrices, and kernels whose B is 1x1."""
    voice, written = shared.as_("critic"), plain()
    speak_up(voice)
    for name, a, b in halves(voice):
        product = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
        written.net.get_submodule(name).weight.add_(3.0 * product)
    expected = say(written, x)
    assert torch.allclose(say(voice, x), expected, rtol=1e-4, atol=1e-5)
    fused = voice.fused()
    assert torch.allclose(say(fused, x), expected, rtol=1e-4, atol=1e-5)
    assert fused.net.state_dict().keys() == plain().net.state_dict().keys() and not fused.training
    assert torch.equal(say(shared.as_(None), x), say(plain(), x))


def test_a_voice_has_its_own_tensors_and_no_others(
    shared: Shared, plain: Callable[[], DiffusersBackbone], family: str
) -> None:
    voice, other = shared.as_("generator"), shared.as_("critic")
    own, own_ids = dict(voice.named_parameters()), {id(p) for p in voice.parameters()}
    assert sum(p.numel() for p in own.values()) == SIZES[family] and all(p.requires_grad for p in own.values())
    assert voice.state_dict().keys() == own.keys() == other.state_dict().keys()
    assert not own_ids & {id(p) for p in other.parameters()}
    assert {id(p) for p in shared.as_("generator").parameters()} == own_ids
    assert not list(shared.as_(None).parameters()) and not shared.as_(None).state_dict()
    everything = list(shared.parameters())
    assert sum(p.numel() for p in everything) == 2 * SIZES[family] + sum(p.numel() for p in plain().parameters())
    assert {id(p) for p in everything if p.requires_grad} == own_ids | {id(p) for p in other.parameters()}
    with pytest.raises(RuntimeError, match="Missing key"):
        voice.load_state_dict({})


def test_training_one_voice_leaves_the_others_alone(shared: Shared, x: Tensor) -> None:
    generator, critic, bare = (shared.as_(name) for name in ("generator", "critic", None))
    before = [say(net, x) for net in (generator, critic, bare)]
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.05)
    for _ in range(2):
        critic(x, T, COND).value.square().sum().backward()
        optimizer.step()
    assert torch.equal(say(generator, x), before[0]) and torch.equal(say(bare, x), before[2])
    assert (say(critic, x) - before[1]).abs().max() > 0.05
    assert {id(p) for p in shared.parameters() if p.grad is not None} == {id(p) for p in critic.parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_tensor_of_the_playing_voice_gets_a_gradient(shared: Shared, x: Tensor, checkpointed: bool) -> None:
    """From the silent start: B at once, A as soon as B has left zero. Other voices speak between the two passes."""
    if checkpointed:
        shared.enable_gradient_checkpointing()
    voice, other = shared.as_("generator"), shared.as_("critic")
    optimizer = torch.optim.SGD(voice.parameters(), lr=1e-3)
    total: dict[str, float] = {}
    for step in range(3):
        value = voice(x, T, COND).value
        say(other, x)
        say(shared.as_(None), x)
        value.square().sum().backward()
        found = gradients(voice)
        assert len(found) == len(list(voice.parameters()))
        if step == 0:
            assert all(found[name].any() == name.endswith("B.weight") for name in found)
        total = {name: total.get(name, 0.0) + g.abs().max().item() for name, g in found.items()}
        optimizer.step()
        optimizer.zero_grad()
    assert min(total.values()) > 1e-6
    assert not gradients(other) and not any(p.grad is not None for p in shared.parameters())


def test_the_switch_of_peft_would_lose_every_gradient(shared: Shared, x: Tensor) -> None:
    """Why it is not used: a forward, the other voices' turn, and then backward."""
    voice = shared.as_("generator")
    loss = voice(x, T, COND).value.square().sum()
    for layer in shared.layers.values():
        layer.enable_adapters(False)
    loss.backward()
    assert not gradients(voice)


def both(shared: Shared, x: Tensor, frozen_critic: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a loss through generator, critic and bare network: of x, the generator and the critic."""
    generator, critic = shared.as_("generator"), shared.as_("critic")
    shared.zero_grad()
    x = x.clone().requires_grad_()
    middle = generator(x, T, COND).value
    if frozen_critic:
        with frozen(critic):
            end = critic(middle, T, COND).value
    else:
        end = critic(middle, T, COND).value
    (end * shared.as_(None)(middle, T, COND).value).sum().backward()
    assert x.grad is not None
    return x.grad, gradients(generator), gradients(critic)


@pytest.mark.parametrize("frozen_critic", [False, True])
def test_recomputation_speaks_with_the_voice_of_the_forward(shared: Shared, x: Tensor, frozen_critic: bool) -> None:
    """Three voices in one graph, one of them frozen for its forward only: the numbers of no checkpointing, exactly."""
    speak_up(shared.as_("generator"), shared.as_("critic"))
    plain_x, plain_generator, plain_critic = both(shared, x, frozen_critic)
    assert plain_x.abs().max() > 1e-3 and bool(plain_critic) != frozen_critic
    shared.enable_gradient_checkpointing()
    for _ in range(2):
        again_x, again_generator, again_critic = both(shared, x, frozen_critic)
        assert torch.equal(again_x, plain_x)
        for plain, again in ((plain_generator, again_generator), (plain_critic, again_critic)):
            assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
        assert all(p.requires_grad for p in shared.as_("critic").parameters())


def test_a_frozen_voice_passes_the_same_gradient_to_its_input(shared: Shared, x: Tensor) -> None:
    speak_up(shared.as_("generator"), shared.as_("critic"))
    free, held = both(shared, x, False), both(shared, x, True)
    assert torch.allclose(free[0], held[0], rtol=1e-4, atol=1e-5)
    assert free[1] and free[2] and held[1] and not held[2]


def test_checkpoints_bear_a_graph_that_is_kept_and_a_voice_that_is_taken(shared: Shared, x: Tensor) -> None:
    """Backward twice through one graph, the second time while another voice speaks and the first one is frozen."""
    shared.enable_gradient_checkpointing()
    voice = shared.as_("generator")
    speak_up(voice)
    x = x.clone().requires_grad_()
    loss = voice(x, T, COND).value.square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    with shared.speaking("critic"), frozen(voice):
        (second,) = torch.autograd.grad(loss, x)
        assert not any(p.requires_grad for p in voice.parameters())
    assert torch.equal(first, second) and first.abs().max() > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_stopped_forward_gives_the_voice_back(shared: Shared, x: Tensor, checkpointed: bool) -> None:
    """Its features and their gradients are those of a whole forward."""
    critic, tap, bare = shared.as_("critic"), shared.backbone.tap, say(shared.as_(None), x)
    speak_up(critic)
    whole = critic(x, T, COND, taps=(tap,)).features[tap]
    whole.square().sum().backward()
    expected = gradients(critic)
    assert len(expected) >= 10
    shared.zero_grad()
    if checkpointed:
        shared.enable_gradient_checkpointing()
    stopped = critic(x, T, COND, taps=(tap,), stop=True)
    assert stopped.value.numel() == 0 and torch.equal(stopped.features[tap], whole)
    assert torch.equal(say(shared.backbone, x), bare)
    stopped.features[tap].square().sum().backward()
    found = gradients(critic)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match="no block 'attic'"):
        critic(x, T, COND, taps=("attic",))
    assert torch.equal(say(shared.backbone, x), bare)


def test_an_exception_gives_the_voice_back(shared: Shared, x: Tensor) -> None:
    critic, bare = shared.as_("critic"), say(shared.as_(None), x)
    speak_up(critic)
    with pytest.raises(RuntimeError):
        critic(x[:, :2], T, COND)
    assert torch.equal(say(shared.backbone, x), bare)
    with pytest.raises(KeyError), shared.speaking("generator"):
        with pytest.raises(RuntimeError):
            critic(x[:, :2], T, COND)
        assert shared._speaking == ["generator"]
        raise KeyError
    assert shared._speaking == [] and torch.equal(say(shared.backbone, x), bare)


def test_voices_may_speak_inside_one_another(shared: Shared, x: Tensor) -> None:
    """A hook in the middle of the critic's forward asks the generator and the bare network."""
    generator, critic = shared.as_("generator"), shared.as_("critic")
    speak_up(generator, critic)
    expected = [say(net, x) for net in (critic, generator, shared.as_(None))]
    heard: list[Tensor] = []

    def ask(module: nn.Module, args: object, output: object) -> None:
        if not heard:
            heard.append(torch.empty(0))
            heard[:] = [say(generator, x), say(shared.as_(None), x)]

    handle = shared.backbone.net.get_submodule(shared.backbone.tap).register_forward_hook(ask)
    assert torch.equal(say(critic, x), expected[0])
    handle.remove()
    assert torch.equal(heard[0], expected[1]) and torch.equal(heard[1], expected[2])


def test_a_voice_is_a_backbone_like_the_one_inside(shared: Shared, x: Tensor) -> None:
    voice, inner = shared.as_("critic"), shared.backbone
    speak_up(voice)
    assert voice.schedule is inner.schedule and voice.kind == inner.kind and voice.tap == inner.tap
    assert voice.null(COND).inputs["class_labels"].tolist() == [4, 4]
    counter = PassCounter(networks_of(Guided(voice), shared.as_(None)))
    guided = say(Guided(voice, 2.0), x)
    assert counter.forwards == 4 and counter.stopped == 0
    with torch.no_grad():
        u, c = voice(x, T, voice.null(COND)).value, voice(x, T, COND).value
    assert torch.allclose(guided, u + 2 * (c - u), rtol=1e-4, atol=1e-5)
    voice.train()
    shared.as_(None).train()
    assert not inner.net.training and not inner.net.get_submodule(inner.tap).training


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dials_belong_to_the_voice(shared: Shared, x: Tensor, checkpointed: bool) -> None:
    """A voice may be told what others are not; a recomputed block hears it too."""
    voice, other = shared.as_("generator"), shared.as_("critic")
    voice.add_dial("to")
    speak_up(voice)
    with pytest.raises(ValueError, match="no dial for to"):
        other(x, T, COND, to=T / 2)
    assert {name.split(".")[0] for name, _ in voice.named_parameters()} == {"adapter", "dials"}
    assert shared.as_("generator").dials is voice.dials and not list(shared.backbone.dials)
    assert (say(voice, x, to=T / 2) - say(voice, x)).abs().max() > 0.1
    voice(x, T, COND, to=T / 2).value.square().sum().backward()
    plain = gradients(voice)
    assert all(g.any() for g in plain.values()) and len(plain) == len(list(voice.parameters()))
    shared.enable_gradient_checkpointing()
    shared.zero_grad()
    voice(x, T, COND, to=T / 2).value.square().sum().backward()
    assert all(torch.equal(g, plain[name]) for name, g in gradients(voice).items())


def test_dials_of_the_network_become_those_of_every_voice(plain: Callable[[], DiffusersBackbone], x: Tensor) -> None:
    net = plain()
    net.add_dial("w")
    nn.init.normal_(net.dials["w"].layers[-1].weight, std=0.3)
    cond = Condition(COND.inputs, {"w": torch.tensor([1.0, 4.0])})
    expected = net(x, T, cond).value
    shared = Shared(net, {"critic": LoraSpec(2, 2.0, ["to_q"])})
    critic = shared.as_("critic")
    assert torch.equal(shared.as_(None)(x, T, cond).value, expected)
    with torch.no_grad():
        assert torch.equal(critic(x, T, cond).value, expected)
    assert all(p.requires_grad for p in critic.dials.parameters())
    assert not any(p.requires_grad for p in shared.as_(None).parameters())
    speak_up(critic)
    assert torch.equal(shared.as_(None)(x, T, cond).value, expected)
    assert torch.allclose(critic.fused()(x, T, cond).value, critic(x, T, cond).value, rtol=1e-4, atol=1e-5)


def test_a_copy_shares_the_network(shared: Shared, x: Tensor) -> None:
    voice = shared.as_("generator")
    speak_up(voice)
    state, random = shared.backbone.net.state_dict(), torch.get_rng_state()
    twin = copy.deepcopy(voice)
    assert torch.equal(torch.get_rng_state(), random)
    assert twin.net is voice.net and twin.shared is shared and twin.voice == "generator_2"
    assert shared.voices == ("generator", "critic", "generator_2")
    now = shared.backbone.net.state_dict()
    assert all(now[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert sum(now[name].numel() for name in now.keys() - state.keys()) == sum(p.numel() for p in voice.parameters())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in voice.parameters()}
    said = say(voice, x)
    assert torch.equal(say(twin, x), said)
    speak_up(voice)
    next(voice.parameters()).data.mul_(2.0)
    assert torch.equal(say(twin, x), said) and not torch.equal(say(voice, x), said)
    assert twin.training and not copy.deepcopy(twin.eval()).training
    assert copy.deepcopy(Guided(voice, 2.0)).inner.voice == "generator_3"
    assert copy.deepcopy(shared.as_(None)).net is voice.net


def test_a_copy_of_the_whole_stands_alone(shared: Shared, x: Tensor) -> None:
    shared.enable_gradient_checkpointing()
    speak_up(shared.as_("generator"), shared.as_("critic"))
    other = copy.deepcopy(shared)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in shared.parameters()}
    mine, theirs = shared.as_("critic"), other.as_("critic")
    assert torch.equal(say(mine, x), say(theirs, x))
    for voice in (mine, theirs):
        voice(x, T, COND).value.square().sum().backward()
    assert all(torch.equal(g, gradients(theirs)[name]) for name, g in gradients(mine).items())


def player(voice: Voice) -> Player:
    one = Player("fake_score", [voice], PlayerConfig(lr=0.01, clip=1e9))
    one.followers["ema"] = Follower(voice, constant_decay(0.75))
    return one


def push(one: Player, x: Tensor) -> None:
    one.modules[0](x, T, COND).value.square().sum().backward()
    one.move(0)


def test_a_follower_trails_a_voice(shared: Shared, x: Tensor) -> None:
    """shadow = 3/4 before + 1/4 after the one move; it speaks with the shadow and learns nothing itself."""
    voice = shared.as_("critic")
    speak_up(voice)
    one = player(voice)
    shadow = one.followers["ema"].module
    assert isinstance(shadow, Voice) and shadow.net is voice.net and not shadow.training
    before = {name: p.detach().clone() for name, p in voice.named_parameters()}
    push(one, x)
    for name, p in shadow.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * voice.get_parameter(name), rtol=0, atol=1e-6)
        assert not p.requires_grad and p.dtype == torch.float32
    mean = {k: 0.75 * v + 0.25 * voice.get_parameter(k).detach() for k, v in before.items()}
    followed = say(shadow, x)
    voice.load_state_dict(mean)
    assert torch.allclose(followed, say(voice, x), rtol=1e-4, atol=1e-5)


def test_a_player_of_a_voice_is_saved_and_restored(
    plain: Callable[[], DiffusersBackbone], family: str, x: Tensor
) -> None:
    """The adapter, its follower and two moments of each: four times its size and no weight of the network."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        shared = Shared(plain(), {"critic": LoraSpec(2, 6.0, TARGETS[family])})
        runs.append({"fake_score": player(shared.as_("critic"))})
    first, second = runs
    for _ in range(2):
        push(first["fake_score"], x)
    extra = nn.Module()
    state = {k: v.clone() for k, v in checkpoint.collect(first, extra).items()}
    assert sum(v.numel() for k, v in state.items() if not k.endswith("/step")) == 4 * SIZES[family]
    assert not any("base_layer" in name for name in state)
    push(second["fake_score"], x)
    checkpoint.restore(state, second, extra)
    second["fake_score"].moves = 2
    for run in runs:
        push(run["fake_score"], x)
    ends = [checkpoint.collect(run, extra) for run in runs]
    assert ends[0].keys() == ends[1].keys() == state.keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in state)
    with pytest.raises(checkpoint.Damaged, match="does not fit"):
        checkpoint.restore({k: v for k, v in state.items() if "lora_A" not in k}, second, extra)


def test_voices_may_have_different_targets(plain: Callable[[], DiffusersBackbone], family: str, x: Tensor) -> None:
    few, many = TARGETS[family][:1], ["*"]
    shared = Shared(plain(), {"critic": LoraSpec(1, 1.0, few), "generator": LoraSpec(3, 1.0, many)})
    critic, generator = shared.as_("critic"), shared.as_("generator")
    names = {name for name, _, _ in halves(critic)}
    assert names and all(few[0].rstrip("*") in name for name in names)
    layers = [m for m in plain().net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert names < {name for name, _, _ in halves(generator)} and len(list(halves(generator))) == len(layers)
    bare = say(shared.as_(None), x)
    speak_up(generator)
    assert torch.equal(say(critic, x), bare) and not torch.equal(say(generator, x), bare)


def test_the_adapters_of_a_half_precision_network_are_float32(
    plain: Callable[[], DiffusersBackbone], family: str, x: Tensor
) -> None:
    """Also those of a follower, which does not cast the network."""
    half = plain().bfloat16()
    expected = say(half, x.bfloat16())
    shared = Shared(half, {"critic": LoraSpec(2, 2.0, TARGETS[family])})
    critic = shared.as_("critic")
    assert torch.equal(say(critic, x.bfloat16()), expected) and half.net.dtype == torch.bfloat16
    one = player(critic)
    push(one, x.bfloat16())
    assert {p.dtype for p in (*critic.parameters(), *one.followers["ema"].module.parameters())} == {torch.float32}
    assert torch.equal(say(shared.as_(None), x.bfloat16()), expected)


def test_a_network_without_memory_can_be_shared(tiny_unet: Make) -> None:
    """Its adapters are real: no file has what they start with."""
    with torch.device("meta"):
        net = tiny_unet()
    shared = Shared(DiffusersBackbone(net, Flow(), "flow_prediction"), {"critic": LoraSpec(2)})
    devices = {(".lora_" in name, p.device.type) for name, p in shared.named_parameters()}
    assert devices == {(False, "meta"), (True, "cpu")}
    assert sum(p.numel() for p in shared.as_("critic").parameters()) == 4 * 4 * 2 * 16


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: LoraSpec(rank=0), "at least 1, but 0"),
        (lambda: LoraSpec(alpha=0.0), "above 0, but 0.0"),
        (lambda: LoraSpec(alpha=float("nan")), "above 0, but nan"),
        (lambda: LoraSpec(targets=[]), "needs targets"),
    ],
)
def test_impossible_sizes_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize("name", ["", "a.b", "two words", "keys", "training"])
def test_impossible_names_are_refused(name: str, tiny_unet: Make) -> None:
    with pytest.raises(UserError, match=f"but '{name}' was given"):
        Shared(DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction"), {name: LoraSpec()})


def test_targets_that_match_nothing_are_refused(tiny_unet: Make) -> None:
    """With the names there are; the network is left as it was."""
    net = tiny_unet()
    before = list(net.state_dict())
    specs = {"generator": LoraSpec(), "critic": LoraSpec(targets=["to_q", "q"])}
    with pytest.raises(UserError, match=r"voice critic: .* UNet2DModel .* 'q': use .*conv1, .*to_out\.0, to_q"):
        Shared(DiffusersBackbone(net, Flow(), "flow_prediction"), specs)
    assert list(net.state_dict()) == before


def test_a_network_is_shared_once_and_has_the_voices_it_was_given(shared: Shared) -> None:
    with pytest.raises(ValueError, match="shared already"):
        Shared(shared.backbone, {})
    with pytest.raises(ValueError, match="no voice 'teacher': it has generator, critic"):
        shared.as_("teacher")


def test_adapters_of_a_low_network_compute_in_its_precision(plain: Callable[[], DiffusersBackbone], x: Tensor) -> None:
    """Inputs and outputs of both halves are bfloat16; their gradients are float32 and near those of float32."""
    gradients, seen = [], set()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        backbone = plain()
        backbone.net.to(dtype)
        shared = Shared(backbone, {"generator": LoraSpec(2, 6.0, ["to_q"])})
        voice = shared.as_("generator")
        speak_up(voice)
        for half in shared._halves["generator"]:
            half.register_forward_hook(lambda _, given, made: seen.add((given[0].dtype, made.dtype)))
        voice(x.to(dtype), T, COND).value.square().mean().backward()
        gradients.append(torch.cat([half.weight.grad.flatten() for half in shared._halves["generator"]]))
        assert {half.weight.dtype for half in shared._halves["generator"]} == {torch.float32}
    assert seen == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    exact, low = gradients
    assert low.dtype == torch.float32 and (low - exact).norm() < 0.05 * exact.norm()
