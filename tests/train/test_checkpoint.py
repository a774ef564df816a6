from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.train import checkpoint
from fewstep.train.checkpoint import MANIFEST, STATE, Damaged
from fewstep.train.player import Follower, Player, PlayerConfig


class Net(nn.Module):
    """A layer, a tied copy of its weight, a frozen weight, a bfloat16 weight and a counting buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.second(self.first(x).tanh()) * self.low * self.fixed


class Extra(nn.Module):
    """An objective with a buffer and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.register_buffer("bins", torch.zeros(4))


class World:
    """Everything that a run saves."""

    def __init__(self, seed: int = 0, with_head: bool = True):
        torch.manual_seed(seed)
        self.extra = Extra()
        critic = [Net(), self.extra.head] if with_head else [Net()]
        settings = PlayerConfig(lr=0.05, betas=[0.9, 0.99], warmup=5)
        self.players = {
            "generator": Player("generator", [Net()], settings),
            "fake_score": Player("fake_score", critic, settings),
        }
        self.players["generator"].followers["ema"] = Follower(self.players["generator"].modules[0], lambda moves: 0.7)

    def play(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            self.extra.bins += step
            for player in self.players.values():
                for module in player.modules:
                    x = module(x.detach())
                    x.square().mean().backward()
                player.move(step)

    def state(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in checkpoint.collect(self.players, self.extra).items()}

    def save(self, folder: Path, step: int) -> Path:
        return checkpoint.save(folder, step, self.players, self.extra)

    def load(self, path: Path) -> int:
        return checkpoint.load(path, self.players, self.extra)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names, types and bits."""
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after three steps, with one after two before it."""
    world = World()
    world.play(range(2))
    world.save(tmp_path, 2)
    world.play(range(2, 3))
    return world.save(tmp_path, 3)


def test_a_resumed_run_is_bit_exact(tmp_path: Path) -> None:
    whole, first, second = World(), World(), World(seed=9)
    whole.play(range(6))
    first.play(range(3))
    path = first.save(tmp_path, 3)
    assert path == tmp_path / "0000003"
    assert second.load(path) == 3
    assert same(second.state(), first.state())
    second.play(range(3, 6))
    assert same(second.state(), whole.state()) and len(whole.state()) > 40
    for name in whole.players:
        assert second.players[name].moves == whole.players[name].moves == 6
        assert second.players[name].learning_rate() == whole.players[name].learning_rate()


def test_saving_changes_nothing(tmp_path: Path) -> None:
    world = World()
    world.play(range(2))
    before = world.state()
    world.save(tmp_path, 2)
    assert same(world.state(), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000002"]
    assert sorted(p.name for p in (tmp_path / "0000002").iterdir()) == [MANIFEST, STATE]


def test_the_manifest_says_what_is_there(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["step"] == 3 and manifest["moves"] == {"generator": 3, "fake_score": 3}
    assert manifest["sha256"] == {STATE: checkpoint.sha256(saved / STATE)}
    assert checkpoint.verify(saved) == manifest


def test_a_manifest_of_the_first_format_is_still_read(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["seal"]
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert World().load(saved) == 3


def test_saving_again_replaces_the_old_checkpoint(tmp_path: Path) -> None:
    world = World()
    world.play(range(1))
    world.save(tmp_path, 5)
    world.play(range(1, 2))
    path, after = world.save(tmp_path, 5), World(seed=3)
    after.load(path)
    assert same(after.state(), world.state())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip, remove, empty])
def test_a_damaged_state_is_refused_with_a_way_on(harm: Callable[[Path], None], saved: Path) -> None:
    harm(saved / STATE)
    world = World()
    before = world.state()
    with pytest.raises(Damaged) as caught:
        world.load(saved)
    message = str(caught.value)
    assert str(saved) in message and STATE in message
    assert f"--resume {saved.parent / '0000002'}" in message
    assert same(world.state(), before)
    assert world.load(saved.parent / "0000002") == 2


@pytest.mark.parametrize("harm", [truncate, remove, empty])
def test_a_damaged_manifest_is_refused_with_a_way_on(harm: Callable[[Path], None], saved: Path) -> None:
    harm(saved / MANIFEST)
    with pytest.raises(Damaged, match=f"{MANIFEST} cannot be read") as caught:
        World().load(saved)
    assert str(saved) in str(caught.value) and f"--resume {saved.parent / '0000002'}" in str(caught.value)


def test_no_flipped_bit_of_a_manifest_passes(saved: Path) -> None:
    """A wrong step or count of moves would repeat or skip steps in silence."""
    whole = (saved / MANIFEST).read_bytes()
    changed = [i for i, byte in enumerate(whole) if chr(byte).isalnum()]
    assert len(changed) > 150
    for i in changed:
        (saved / MANIFEST).write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(Damaged):
            checkpoint.verify(saved)
    (saved / MANIFEST).write_bytes(whole)
    assert checkpoint.verify(saved)["step"] == 3


@pytest.mark.parametrize("text", ["[]", "{}", '{"sha256": []}', '{"sha256": {}}', '"step"', "null"])
def test_a_manifest_without_its_entries_is_refused(text: str, saved: Path) -> None:
    (saved / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=f"{MANIFEST} cannot be read"):
        World().load(saved)


def test_the_newest_sound_checkpoint_is_offered(saved: Path) -> None:
    """Older ones may be damaged too, and newer ones whole."""
    world, folder = World(), saved.parent
    for step in (4, 5):
        world.play(range(step - 1, step))
        world.save(folder, step)
    flip(folder / "0000005" / STATE)
    empty(folder / "0000004" / MANIFEST)
    with pytest.raises(Damaged, match=f"newest that is whole with --resume {saved}$"):
        world.load(folder / "0000005")
    flip(folder / "0000002" / STATE)
    with pytest.raises(Damaged, match=f"newest that is whole with --resume {saved}$"):
        world.load(folder / "0000002")
    truncate(saved / STATE)
    with pytest.raises(Damaged, match="no other one is whole"):
        world.load(folder / "0000005")


def test_a_checkpoint_of_other_networks_is_refused(saved: Path) -> None:
    small = World()
    small.players["generator"] = Player("generator", [nn.Linear(2, 2)], PlayerConfig())
    with pytest.raises(Damaged, match="does not fit the configured networks"):
        small.load(saved)


def test_tensors_without_a_place_are_refused(saved: Path) -> None:
    without = World(with_head=False)
    with pytest.raises(Damaged, match=r"holds \d+ tensors this run has no place for, such as fake_score/optimizer/1"):
        without.load(saved)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("IoError: disk full")])
@pytest.mark.parametrize("when", ["before", "half"])
def test_a_failing_write_leaves_no_half_checkpoint(
    error: Exception, when: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(state: Any, path: Path) -> None:
        if when == "half":
            path.write_bytes(b"\x00" * 1000)
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fails)
    world = World()
    world.play(range(4))
    for step in (3, 4):  # one that is there already, and a new one
        with pytest.raises(OSError, match=r"No space|disk full"):
            world.save(saved.parent, step)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["0000002", "0000003"]
    monkeypatch.undo()
    assert checkpoint.verify(saved)["step"] == 3


def test_a_write_that_loses_a_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda state, path: honest(dict(list(state.items())[1:]), path))
    with pytest.raises(OSError, match="does not hold what was written"):
        World().save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_changes_a_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.save_file

    def lies(state: dict[str, Tensor], path: Path) -> None:
        honest(state, path)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(checkpoint, "save_file", lies)
    with pytest.raises(OSError, match="does not hold what was written"):
        World().save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_none_is_what_was_written(tmp_path: Path) -> None:
    """A NaN is not equal to itself, but its bytes are."""
    state = {"a": torch.tensor([float("nan"), 1.0]), "b": torch.tensor(3), "c": torch.zeros(0)}
    checkpoint.write_state(tmp_path / STATE, state)
    assert not checkpoint.same_bits(state["a"], torch.tensor([float("nan"), 2.0]))
    assert not checkpoint.same_bits(state["b"], torch.tensor(3.0)) and checkpoint.same_bits(state["c"], state["c"])


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", fails)
    with pytest.raises(OSError, match="No space"):
        World().save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest_and_clears_half_written_ones(tmp_path: Path) -> None:
    world = World()
    for step in (5, 100, 20):
        world.save(tmp_path, step)
    (tmp_path / ".0000200.partial").mkdir()
    (tmp_path / ".0000200.partial" / STATE).write_bytes(b"half")
    (tmp_path / ".0000003.gone").mkdir()
    (tmp_path / "notes").mkdir()
    assert [p.name for p in checkpoint.available(tmp_path)] == ["0000005", "0000020", "0000100"]
    checkpoint.prune(tmp_path / "0000100", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000020", "0000100", "notes"]
    checkpoint.prune(tmp_path / "0000100", 5)
    assert len(checkpoint.available(tmp_path)) == 2


def test_pruning_waits_for_a_new_checkpoint_that_is_whole(tmp_path: Path) -> None:
    world = World()
    for step in (1, 2, 3):
        world.save(tmp_path, step)
    flip(tmp_path / "0000003" / STATE)
    with pytest.raises(Damaged):
        checkpoint.prune(tmp_path / "0000003", 1)
    assert [p.name for p in checkpoint.available(tmp_path)] == ["0000001", "0000002", "0000003"]
    world.save(tmp_path, 3)
    checkpoint.prune(tmp_path / "0000003", 1, best=1)
    assert [p.name for p in checkpoint.available(tmp_path)] == ["0000001", "0000003"]


def test_pruning_where_the_run_has_gone_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it has gone since it was written"):
        checkpoint.prune(tmp_path / "0000003", 1)


def test_of_a_damaged_stage_the_stage_before_is_offered(tmp_path: Path) -> None:
    world = World()
    for stage, steps in (("stage_1", (4,)), ("stage_2", (4,)), ("stage_9", (4,)), ("stage_10", (2, 4))):
        (tmp_path / stage).mkdir()
        for step in steps:
            world.save(tmp_path / stage / "checkpoints", step)
    last = tmp_path / "stage_10" / "checkpoints"
    for step, offered in ((4, last / "0000002"), (2, tmp_path / "stage_9" / "checkpoints" / "0000004")):
        flip(last / f"{step:07d}" / STATE)
        with pytest.raises(Damaged, match=f"--resume {offered}$"):
            checkpoint.verify(last / "0000004")
    with pytest.raises(Damaged, match="no other one is whole"):
        flip(tmp_path / "stage_1" / "checkpoints" / "0000004" / STATE)
        checkpoint.verify(tmp_path / "stage_1" / "checkpoints" / "0000004")


def test_what_was_gone_back_on_is_removed_after_the_next_checkpoint(tmp_path: Path) -> None:
    """A later resume would go on from it otherwise, though the log behind it is cut."""
    world = World()
    for step in (1, 2, 3, 9):
        world.save(tmp_path, step)
    checkpoint.prune(tmp_path / "0000003", 2, best=None)
    assert [p.name for p in checkpoint.available(tmp_path)] == ["0000002", "0000003"]


def test_the_same_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    world = World()
    path = world.save(tmp_path, 1)
    stamp = (path / STATE).stat().st_ino
    world.save(tmp_path, 1)
    assert (path / STATE).stat().st_ino == stamp
    flip(path / STATE)
    world.save(tmp_path, 1)
    assert (path / STATE).stat().st_ino != stamp and checkpoint.wrong(path) is None


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    checkpoint.write_text(file, "before")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_text(file, "after")
    assert file.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_half_written_checkpoint_is_not_available(tmp_path: Path) -> None:
    (tmp_path / ".0000007.partial").mkdir(parents=True)
    assert checkpoint.available(tmp_path) == [] and checkpoint.available(tmp_path / "nowhere") == []
    World().save(tmp_path, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["0000007"]


def test_one_network_is_read_alone(saved: Path) -> None:
    world = World(seed=4)
    world.load(saved)
    generator, critic = world.players["generator"], world.players["fake_score"]
    assert same(checkpoint.read_network(saved, "generator", "ema"), generator.followers["ema"].module.state_dict())
    assert same(checkpoint.read_network(saved, "generator", None), generator.modules[0].state_dict())
    assert same(checkpoint.read_network(saved, "fake_score", "ema"), critic.modules[0].state_dict())
    with pytest.raises(UserError, match=f"{saved} holds no network called teacher"):
        checkpoint.read_network(saved, "teacher", None)
    flip(saved / STATE)
    with pytest.raises(Damaged):
        checkpoint.read_network(saved, "generator", None)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_the_optimizer_resumes_on_the_device_of_its_player() -> None:
    world, net = World(), Net().to("meta")
    world.play(range(1))
    state, player = world.state(), world.players["generator"]
    player.followers, player.modules, player.optimizer = {}, [net], torch.optim.AdamW(net.parameters())
    state = {k: v for k, v in state.items() if k.startswith("generator") and "follower" not in k}
    checkpoint.restore(state, {"generator": player}, nn.Module())
    devices = {v.device.type for moments in player.optimizer.state.values() for v in moments.values()}
    assert devices == {"meta"} and len(player.optimizer.state) == 4


def test_the_state_holds_tensors_of_every_part(saved: Path) -> None:
    parts = {name.rsplit("/", 1)[0] for name in load_file(saved / STATE)}
    assert {"objective", "generator/network", "generator/follower.ema", "fake_score/network"} < parts
    assert {"generator/optimizer/0.first.weight", "fake_score/optimizer/1.weight"} < parts


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("9999999", "10000000", "0000002", "²", "x1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.available(tmp_path)] == ["0000002", "9999999", "10000000"]


def test_an_optimizer_without_all_of_its_moments_is_refused(saved: Path) -> None:
    state = load_file(saved / STATE)
    name = next(name for name in state if name.startswith("generator/optimizer/") and name.endswith("/step"))
    del state[name]
    with pytest.raises(Damaged, match=r"the optimizer of generator has exp_avg, exp_avg_sq of 0\.first\."):
        checkpoint.restore(state, World(1).players, World(1).extra)
