"""Pictures of a pipeline whose passes are replayed: the same as eager ones, measured, and what is said of them."""

from pathlib import Path

import pytest
import torch

from mos_cli.bundles.bundle import Bundle
from mos_cli.config.recipe import make_recipe
from mos_cli.inference import pipeline as pipelines
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.inference.profiling import measure
from mos_cli.planning.memory import Setting
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.graphs import StepGraphs
from tests.helpers.recomputed import Recomputed

CPU = torch.device("cpu")
STEPS = 6


class Failing(Recomputed):
    def record(self, function):
        raise RuntimeError("the driver is too old")


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines replay and use buckets, as on CUDA."""
    monkeypatch.setattr(MoSPipeline, "_make_graphs", lambda self: StepGraphs(Recomputed()).add_to(self.tower))
    monkeypatch.setattr(pipelines, "prompt_bucket", lambda *_: 16)


def recipe(prompt: str, seed: int = 1, **changes):
    sizes = {"width": 32, "height": 32, "steps": STEPS, "cfg": 2.0, "cfg_interval": (0.0, 1.0)}
    return make_recipe(prompt=prompt, model="tiny", seed=seed, precision="fp32", **{**sizes, **changes})


def test_pictures_are_those_of_eager_passes(bundle: Bundle, encoder_folder: Path, replaying) -> None:
    replayed, eager = (MoSPipeline(bundle, encoder_folder, device=CPU, precision="fp32") for _ in range(2))
    eager.graphs._always = "to compare"
    for asked in (
        recipe("a dog"),
        recipe("a red apple on a green table", 2),
        recipe("a cat", 3, cfg_interval=(0.2, 0.7)),
        recipe("a (red:1.4) apple", 4),
        recipe("a red apple", 5, routes=("apple=1", "red!=0 steps 2-4")),
        recipe("a red apple", 6, routes=("shuffle:3",)),
        recipe("a red apple", 7, feature_cache=2),
        recipe("a red apple", 8, solver="euler", cfg=1.0),
        recipe("a dog"),
    ):
        one, other = replayed.draw(asked), eager.draw(asked)
        assert one.record.sha256 == other.record.sha256
        assert one.trace.branches == other.trace.branches
    assert replayed.graphs.replayed > 5 * STEPS
    assert replayed.graphs.failure is None
    assert eager.graphs.note == "none: to compare"


def test_what_is_recorded_within_changes_no_picture(bundle: Bundle, encoder_folder: Path, replaying) -> None:
    pipeline = MoSPipeline(bundle, encoder_folder, device=CPU, precision="fp32")
    drawings = [
        pipeline.draw(recipe("a red apple"), record_options=options)
        for options in (
            RecordOptions(),
            RecordOptions(probabilities=True, regions=True, previews=True),
            RecordOptions(),
        )
    ]
    assert len({drawing.record.sha256 for drawing in drawings}) == 1
    assert len(drawings[1].previews) == STEPS


def test_measuring_says_how_many_passes_were_replayed(bundle: Bundle, encoder_folder: Path, replaying) -> None:
    pipeline = MoSPipeline(bundle, encoder_folder, device=CPU, precision="fp32")
    timing = measure(pipeline, recipe("a dog"), 2)
    # But for the first pass, and the one that is captured.
    assert timing.graphs == f"{3 * STEPS - 2} of {3 * STEPS} passes replayed"
    assert timing.router_share is not None
    assert 0 < timing.router_share < 1


def test_why_passes_are_not_replayed_is_known(bundle: Bundle, encoder_folder: Path) -> None:
    pipeline = MoSPipeline(bundle, encoder_folder, device=CPU, precision="fp32")
    assert measure(pipeline, recipe("a dog"), 1).graphs == "none: there is no CUDA device"
    pipeline.device = torch.device("cuda")
    for setting, said in (
        (Setting(offload="blocks"), "offloaded weights"),
        (Setting(batched_guidance=False), "one by one"),
    ):
        pipeline.setting = setting
        assert said in pipeline._make_graphs().note
    pipeline.setting = Setting()
    # As weights of bitsandbytes have it.
    pipeline.tower.blocks[0].mlp.down.weight.SCB = None
    assert "int8" in pipeline._make_graphs().note


def test_the_command_says_so_in_one_line(mos, bundle: Bundle, tmp_path: Path, replaying, monkeypatch) -> None:
    how = ("--precision", "fp32", "-s", 1, "--steps", STEPS, "-o")
    result = mos("generate", "a dog", *how, tmp_path / "a.png", "-v")
    assert f"graphs      {STEPS - 2} of {STEPS} passes replayed" in result.stderr
    assert mos("replay", tmp_path / "a.png", "--verify").stdout.strip() == "exact"
    monkeypatch.setattr(MoSPipeline, "_make_graphs", lambda self: StepGraphs(Failing()).add_to(self.tower))
    result = mos("generate", "a dog", *how, tmp_path / "b.png")
    assert result.exit_code == 0
    assert "steps are not replayed as CUDA graphs: not captured: the driver is too old" in result.stderr
    assert (tmp_path / "b.png").read_bytes()


@pytest.mark.cuda
def test_cuda_pictures_do_not_depend_on_those_before(bundle: Bundle, encoder_folder: Path) -> None:
    fresh, used = (
        MoSPipeline(bundle, encoder_folder, device=torch.device("cuda"), precision="bf16", attention="sdpa")
        for _ in range(2)
    )
    for prompt in ("a dog", "a red apple on a green table", "a cat", "a dog"):
        asked = recipe(prompt, steps=12).model_copy(update={"precision": "bf16"})
        fresh.graphs._graphs.clear()
        fresh.graphs._calls.clear()
        assert used.draw(asked).record.sha256 == fresh.draw(asked).record.sha256
    assert used.graphs.failure is None
    assert used.graphs.replayed >= 3 * 10
