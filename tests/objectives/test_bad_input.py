"""What every objective says, before anything is trained, of a config that lacks what it needs: one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from fewstep import build, config
from fewstep.core.errors import UserError
from fewstep.models import schedulers
from fewstep.objectives import base
from fewstep.train.loop import train_step

NAMES = [name for name in base.names() if name != "diffusion"]
GAN = {"gan_weight": 0.1}
NEEDED: dict[str, dict[str, Any]] = {
    "ac_dmd": {"consistency": 0.0},
    "decoupled_dmd": GAN,
    "phased_dmd": {"phases": 1},
    "re_dmd": {"reward": "tiny:brightness", **GAN},
    "reward": {"reward": "tiny:brightness"},
    "sum": {"terms": [{"name": "dmd2"}, {"name": "paired"}]},
    "tscd": {"segments": 3},
}
"""what an objective cannot be named without, or to give it a GAN"""
JUDGED = ("ladd", "sana_sprint")
"""whose discriminator does not hang on a weight"""

Make = Callable[..., build.Run]


def network(classes: int | None) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "num_class_embeds": classes,
    }


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random ones: `whole` has a null class, `null` and `labels` lack that or any class.

    Those of another process predict epsilon, the sample, or v where no image is left at t = 1.
    """
    folder, made = tmp_path_factory.mktemp("teachers"), {}
    processes = {
        "vp": {"prediction_type": "epsilon"},
        "sample": {"prediction_type": "sample"},
        "no_image": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    }
    for name, classes in (("whole", 13), ("null", 12), ("labels", None), *((name, 13) for name in processes)):
        torch.manual_seed(0)
        net, vp = diffusers.UNet2DModel(**network(classes)), processes.get(name)
        scheduler = schedulers.flow_scheduler() if vp is None else diffusers.DDIMScheduler(**vp)
        pipe = diffusers.ConsistencyModelPipeline if vp is None else diffusers.DDIMPipeline
        pipe(unet=net, scheduler=scheduler).save_pretrained(made.setdefault(name, folder / name))
    return made


@pytest.fixture
def run(teachers: dict[str, Path], tmp_path: Path) -> Make:
    """Builds a run of an objective, guided where the teacher can be; `without` leaves one of its players out."""

    def make(
        name: str, teacher: str = "whole", source: str = "scenes", without: str = "", model: Any = None, **own: Any
    ) -> build.Run:
        objective = {"name": name, **NEEDED.get(name, {}), **own}
        if name in ("uni_dad", "tcm"):
            objective = {"target_teacher": str(teachers[teacher]), **objective}
        roles = base.find(name).Objective.needs(base.typed(objective))
        players = [*(role for role in roles if role not in base.FROZEN), *(["discriminator"] if name in JUDGED else [])]
        one = {
            "name": "bad",
            "device": "cpu",
            "batch": 4,
            "model": {"teacher": str(teachers[teacher]), "guidance": 2.0, **(model or {})},
            "objective": objective,
            "players": {player: {"lr": 1e-3} for player in players if player != without},
            "data": {"source": source, "resolution": 16},
            "pairs": {"count": 8, "steps": 2},
        }
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump(one))
        return build.build(config.load(file)[0])

    return make


@pytest.mark.parametrize("name", NAMES)
def test_whoever_needs_nothing_more_is_built(name: str, run: Make) -> None:
    """So what the other tests take away is what they are refused for."""
    assert run(name).objective.config.name == name


HEARS = ("decoupled_dmd", "msd", "snoopi")
"""refused on noise for the labels that it has not, or the guidance that needs them"""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HEARS])
def test_images_that_are_not_there(name: str, run: Make) -> None:
    if "x0" not in run(name).objective.reads:
        assert name not in ("dmd2", "f_distill", "sida", "twinflow", "consistency", "score_match")
        return
    with pytest.raises(UserError, match=f"{name} learns from images, but data.source=noise has none: name a folder"):
        run(name, "labels", "noise", model={"guidance": 1.0})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "decoupled_dmd"])
def test_guidance_without_a_null_condition(name: str, run: Make) -> None:
    with pytest.raises(UserError, match=r"no null class, so it cannot be guided: set model.guidance=1"):
        run(name, "null")


@pytest.mark.parametrize("name", ["swiftbrush", "snoopi"])
def test_a_critic_that_cannot_do_without_its_label(name: str, run: Make) -> None:
    with pytest.raises(UserError, match="one class more than there are labels"):
        run(name, "null", model={"guidance": 1.0})
    with pytest.raises(UserError, match="one class more than there are labels"):
        run("sum", "null", model={"guidance": 1.0}, terms=[{"name": "dmd2"}, {"name": name}])


@pytest.mark.parametrize("name", NAMES)
def test_a_player_that_is_missing(name: str, run: Make) -> None:
    for player in run(name).players:
        with pytest.raises(UserError, match=f"players.{player} is missing: set at least players.{player}.lr"):
            run(name, without=player)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_is_missing(name: str, run: Make) -> None:
    """Of those that ask one for its score or for pairs; the others may start from nothing."""
    new = {"teacher": None, "network": {"class": "UNet2DModel", **network(13)}, "guidance": 1.0}
    flow = {"process": {"name": "flow"}, "prediction": "flow_prediction"}
    objective = run(name).objective
    if "real_score" not in objective.needs(objective.config) and "pair" not in objective.reads:
        assert name in ("ect", "imm", "moment", "reward", "tcm", "twinflow")
        return
    with pytest.raises(UserError, match=rf"objective {name} (asks|reads) .* set model.teacher"):
        run(name, model={**new, **flow})


TAPPED = [name for name in NAMES if hasattr(base.find(name).Config, "gan_weight") or name in JUDGED]


@pytest.mark.parametrize("name", [name for name in TAPPED if name != "sida"])
def test_a_block_that_is_not_there(name: str, run: Make) -> None:
    with pytest.raises(
        UserError, match=r"gan_taps: no block 'mid' in UNet2DModel: its blocks are conv_in, .*mid_block"
    ):
        run(name, gan_taps=["mid"])


def test_a_key_that_is_not_there(run: Make) -> None:
    with pytest.raises(UserError, match=r"'gan_taps' not in 'Config' .*`fewstep objectives sid` shows its keys"):
        run("sid", gan_taps=["mid_block"])


@pytest.mark.parametrize("name", ["re_dmd", "reward"])
def test_a_reward_of_labels_on_networks_without_any(name: str, run: Make) -> None:
    with pytest.raises(UserError, match="are told none: take a teacher with class labels, or name a function"):
        run(name, "labels", model={"guidance": 1.0}, reward="label_log_probability")


def test_a_target_teacher_of_another_process(run: Make, teachers: dict[str, Path]) -> None:
    """Its weights would fit, and be read as what they are not."""
    with pytest.raises(
        UserError, match=r"predicts epsilon on a VP process, but model.teacher flow_prediction on a Flow"
    ):
        run("uni_dad", target_teacher=str(teachers["vp"]))
    assert run("uni_dad", target_teacher=str(teachers["whole"])).triad.target_score is not None


def test_parts_of_other_labels_than_those_of_the_data(run: Make) -> None:
    for own in ({"labels": 6}, {"terms": [{"name": "dmd2"}, {"name": "msd", "labels": 6}]}):
        with pytest.raises(UserError, match=r"of labels that data.source=scenes has, 12, but 6 was given"):
            run("sum" if "terms" in own else "msd", **own)


@pytest.mark.parametrize(
    ("term", "said"),
    [("twinflow", "more than the time: make it the objective"), ("disback", "name it first"), ("ladd", "turns of its")],
)
def test_what_cannot_come_second_in_a_sum(term: str, said: str, run: Make) -> None:
    with pytest.raises(UserError, match=said):
        run("sum", terms=[{"name": "dmd2"}, {"name": term}])


def test_a_sum_draws_its_critic_to_the_generator_where_a_term_does(run: Make) -> None:
    terms = [{"name": "dmd2"}, {"name": "flash_dmd", "critic_average": 0.9}]
    assert [pull.decay for pull in run("sum", terms=terms).players["generator"].pulls] == [0.9]
    assert run("sum", terms=[{"name": "disback"}, {"name": "dmd2"}]).objective.generates(0) is False


@pytest.mark.parametrize("name", ["mdt_dist", "rcm", "sana_sprint", "scm", "tbcm"])
def test_a_network_without_a_boundary_in_continuous_time(name: str, run: Make) -> None:
    with pytest.raises(UserError, match=r"predicts the sample need not give x back at t = 0, .* of objective"):
        run(name, "sample")


def test_on_a_grid_the_boundary_is_in_the_target(run: Make) -> None:
    for name, own in (("consistency", {}), ("rcm", {"discrete": {"name": "consistency"}})):
        assert run(name, "sample", **own).triad.generator.kind == "sample"


FLOWS_ALONE = ("arcflow", "tmd", "twinflow")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*FLOWS_ALONE, "tcm", "uni_dad")])
def test_a_process_that_leaves_no_image_at_the_end(name: str, run: Make, tmp_path: Path) -> None:
    """alpha(1) = 0: nothing divides by it."""
    made = run(name, "no_image")
    build.prepare(made, tmp_path)
    batches = build.batches(made)
    for step in range(2):
        logs = train_step(made.objective, batches(step), step, made.players)
        assert logs and all(torch.as_tensor(value).isfinite().all() for value in logs.values())


@pytest.mark.parametrize("name", FLOWS_ALONE)
def test_a_process_that_is_no_flow(name: str, run: Make) -> None:
    with pytest.raises(UserError, match=r"take a flow teacher"):
        run(name, "no_image")


def test_a_run_says_how_derivatives_are_taken(run: Make) -> None:
    said = "derivative of the generator: exact, forward mode passes through this network"
    assert build.executed(run("scm"))[-1] == said
    assert build.executed(run("meanflow", tangent={"way": "difference"}))[-1].endswith("difference, as asked for")
