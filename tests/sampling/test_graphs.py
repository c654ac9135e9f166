"""Replayed passes are the passes themselves: nothing stale is read and nothing kept is overwritten.

`Recomputed` stands in for CUDA graphs; those marked `cuda` capture them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.feature_cache import caching
from mos_cli.sampling.graphs import KEPT, LEFT, OFTEN, CudaCapture, StepGraphs, prompt_bucket, same
from mos_cli.sampling.guidance import Guidance
from mos_cli.sampling.sampler import make_sigmas, sample
from mos_cli.towers.attention import choose_attention
from mos_cli.towers.bank import join
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import RotaryTables, TokenSequence, rotary
from mos_cli.towers.router import Steering, uniform_route
from tests.helpers.generation_towers import FIXED, ROUTED, WIDTHS, J, M, S, V, inputs, name_of, small_tower
from tests.helpers.recomputed import Recomputed

CPU = torch.device("cpu")


def graphed(tower: GenerationTower, capture: Any = None) -> StepGraphs:
    return StepGraphs(capture or Recomputed()).add_to(tower)


def states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, M, S, generator=torch.Generator().manual_seed(seed))


def drawn(
    tower: GenerationTower,
    positive: int = 6,
    seed: int = 0,
    *,
    steps: int = 12,
    bucket: int | None = 16,
    pictures: bool = False,
    record_options: RecordOptions = RecordOptions(),
    cache: int | None = None,
    steer: Any = None,
    graphs: StepGraphs | None = None,
) -> tuple[torch.Tensor, Recorder, list[torch.Tensor]]:
    """A picture of a prompt of `positive` tokens, what was recorded of it, and copies of its predictions."""
    recorder, predicted = Recorder(record_options), []
    with torch.inference_mode():
        banks = {
            name: tower.project_states(states(tokens, seed + n))
            for n, (name, tokens) in enumerate({"positive": positive, "negative": 2, "unseen": 2}.items())
        }
        if pictures:
            references = tower.cache_references(
                [torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(seed))]
            )
            seen = torch.randn(1, V, M, max(WIDTHS), generator=torch.Generator().manual_seed(seed + 1))
            banks |= {name: tower.add_image_tokens(banks[name], seen, references) for name in ("positive", "negative")}
        with recorder.attached(tower), caching(tower, cache, steps) as (predict, reset_cache):
            if graphs is not None:
                graphs.begin(steps)
            z = sample(
                predict,
                torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(seed)),
                banks,
                sigmas=make_sigmas(FlowMatchEulerDiscreteScheduler(), steps),
                solver="ab2",
                guidance=Guidance(3.0, (0.0, 1.0), 1.5 if pictures else 1.0),
                batched_guidance=True,
                bucket=bucket,
                observers=[recorder, lambda step: predicted.append(step.x_hat_BCHW.clone())],
                steer=steer,
                reset_cache=reset_cache,
            )
    return z, recorder, predicted


def check_same(one: Any, other: Any) -> None:
    """The same latents, bit for bit, and the same routes of every step."""
    assert torch.equal(one[0], other[0])
    for name, routes in other[1].routes().items():
        assert (one[1].routes()[name].ids_SJTK == routes.ids_SJTK).all()
        assert (one[1].routes()[name].weights_SJTK == routes.weights_SJTK).all()


@pytest.mark.parametrize("variant", [*FIXED, *ROUTED], ids=name_of)
@pytest.mark.parametrize("pictures", [False, True], ids=["words", "pictures"])
def test_a_picture_does_not_depend_on_the_bucket(variant: dict[str, Any], pictures: bool) -> None:
    tower = small_tower(**variant, image_state_widths=WIDTHS)
    (z, recorder, _), (other, recorded, _) = (
        drawn(tower, bucket=bucket, pictures=pictures, steps=2) for bucket in (None, 16)
    )
    assert (other - z).norm() < 1e-5 * z.norm()
    for name, routes in recorder.routes().items():
        assert (recorded.routes()[name].ids_SJTK == routes.ids_SJTK).all()
        weights = torch.from_numpy(recorded.routes()[name].weights_SJTK)
        torch.testing.assert_close(weights, torch.from_numpy(routes.weights_SJTK), atol=1e-3, rtol=0)


def test_what_is_recorded_and_steered_does_not_depend_on_the_bucket() -> None:
    tower, options = small_tower(image_state_widths=WIDTHS), RecordOptions(probabilities=True, regions=True)
    allowed = torch.ones(1, 6 + V, J, M, dtype=torch.bool)
    allowed[:, 1, :, 2:] = False
    steer = lambda step, branch: Steering(allowed, 0.1 * allowed.float()) if branch == "positive" else None  # noqa: E731
    ways = [
        drawn(tower, bucket=bucket, pictures=True, steps=2, record_options=options, steer=steer)[1]
        for bucket in (None, 16)
    ]
    for name in ways[0].routes():
        one, other = (recorder.routes()[name] for recorder in ways)
        assert ways[0].changed(name) == ways[1].changed(name)
        for kind in ("probabilities_SJTM", "regions_JTN"):
            assert getattr(one, kind).shape == getattr(other, kind).shape
            assert abs(getattr(one, kind).astype(float) - getattr(other, kind)).max() < 2e-3


def test_prompts_of_a_bucket_have_the_same_shapes_and_a_full_one_no_mask() -> None:
    tower = small_tower()
    banks = {tokens: tower.project_states(states(tokens, 0)) for tokens in (2, 5, 8, 9)}
    assert {join([banks[a], banks[b]], 8).bank_BTMD.shape[1] for a, b in ((5, 2), (2, 8), (8, 8))} == {8}
    assert join([banks[9], banks[2]], 8).bank_BTMD.shape[1] == 16
    mask = join([banks[5], banks[2]], 8).padding.mask_BL
    assert mask.sum(1).tolist() == [5, 2]
    assert join([banks[8], banks[8]], 8).padding.mask_BL is None
    assert join([banks[5], banks[2]]).padding.mask_BL is None


def test_buckets_are_for_cuda_and_for_attention_that_takes_a_mask() -> None:
    cuda, used = torch.device("cuda"), choose_attention(small_tower(), "sdpa")
    assert prompt_bucket(cuda, used, 1024) == 16
    assert prompt_bucket(cuda, used, 4096) is None
    assert prompt_bucket(cuda, "xformers", 1024) is None
    assert prompt_bucket(cuda, f"xformers, {used}", 1024) is None
    assert prompt_bucket(CPU, used, 1024) is None


@pytest.mark.parametrize("bucket", [None, 16])
@pytest.mark.parametrize("pictures", [False, True], ids=["words", "pictures"])
def test_replayed_pictures_are_the_same_whatever_was_drawn_before(bucket: int | None, pictures: bool) -> None:
    tower, other = (small_tower(image_state_widths=WIDTHS) for _ in range(2))
    graphs = graphed(other)
    for positive, seed in ((6, 1), (6, 2), (3, 3), (9, 4), (6, 1)):
        how: dict[str, Any] = {"steps": LEFT + 2, "bucket": bucket, "pictures": pictures}
        check_same(drawn(other, positive, seed, graphs=graphs, **how), drawn(tower, positive, seed, **how))
    # One graph for all these prompts, or one for each length; and one for the branch that does not see the pictures.
    graphs_made = (1 if bucket else 3) + pictures
    assert graphs.capture.captured == graphs_made
    assert graphs.failure is None
    # But for the first pass of each, and the one that is captured.
    assert graphs.replayed == graphs.passes - 2 * graphs_made


def test_the_fixed_routes_and_the_input_of_guidance_are_replayed_too() -> None:
    for changes in ({"fusion": "aligned"}, {"fusion": "mean", "context": "cross"}, {"routing": "sample"}):
        tower, other = small_tower(**changes), small_tower(**changes)
        graphs = graphed(other)
        for seed in (1, 2):
            check_same(drawn(other, seed=seed, steps=LEFT + 2, graphs=graphs), drawn(tower, seed=seed, steps=LEFT + 2))
        assert graphs.replayed == 2 * LEFT + 2
    tower, other = (small_tower(guidance_max=8.0) for _ in range(2))
    graphs, z = graphed(other), inputs(1)[0]
    torch.nn.init.normal_(tower.guidance_in.mlp.linear_2.weight)
    other.load_state_dict(tower.state_dict())
    with torch.inference_mode():
        bank, t_1 = tower.project_states(states(5, 0)), torch.full((1,), 0.5)
        scales = [torch.full((1,), scale) for scale in (1.0, 3.0, 3.0, 7.0, 2.0)]
        said = [other(z, t_1, bank, guidance_B=scale)[0] for scale in scales]
        for scale, x_hat in zip(scales, said, strict=True):
            assert torch.equal(x_hat, tower(z, t_1, bank, guidance_B=scale)[0])
        assert graphs.replayed == 3
        # Without the scale it is another pass.
        other(z, t_1, bank)
        assert graphs.replayed == 3


def test_rules_take_effect_at_their_steps() -> None:
    tower, other = small_tower(), small_tower()
    graphs = graphed(other)

    def rule(layer: int, bias: float | None = None) -> Steering:
        allowed = torch.ones(1, 6, J, M, dtype=torch.bool)
        allowed[:, 1, :, :layer] = False
        return Steering(allowed, None if bias is None else torch.full(allowed.shape, bias) * ~allowed)

    order = Steering(torch.ones(1, 6, J, M, dtype=torch.bool), None, torch.arange(M).flip(0).expand(J, M))
    route = uniform_route([[0, 2]] * J, CPU)
    plans: list[Any] = [
        # Another layer at every third step, so that replays alternate between steerings of one shape.
        [rule(1 + step // 3 % 3) for step in range(12)],
        [rule(1, 0.5) if step < 6 else None for step in range(12)],
        [order] * 12,
        [route] * 12,
    ]
    for plan in plans:
        # Baselines and orders are of all branches.
        everywhere = any(plan[0] is one for one in (order, route))

        def steer(step: int, branch: str, plan: Any = plan, everywhere: bool = everywhere) -> Any:
            steering = plan[step] if branch == "positive" or everywhere else None
            short = steering is order and branch == "negative"
            return Steering(order.allowed_BTJM[:, :2], None, order.order_JM) if short else steering

        kept: dict[Any, Any] = {}

        def same_object(step: int, branch: str, steer: Any = steer, kept: Any = kept) -> Any:
            # As `Steerer` does.
            steering = steer(step, branch)
            return kept.setdefault((branch, str(steering)), steering)

        expected = drawn(tower, steer=same_object)
        check_same(drawn(other, steer=same_object, graphs=graphs), expected)
    assert graphs.failure is None
    assert graphs.replayed >= 4 * 8


def test_what_observers_keep_is_not_overwritten() -> None:
    tower, kept = small_tower(), []
    graphs = graphed(tower)
    _, recorder, predicted = drawn(tower, record_options=RecordOptions(previews=True), graphs=graphs)
    assert graphs.replayed == 10
    assert all(map(torch.equal, recorder.x_hats, predicted))
    drawn(tower, seed=7, graphs=graphs)
    assert all(map(torch.equal, recorder.x_hats, predicted))
    with torch.inference_mode():
        z, bank = inputs(1)[0], tower.project_states(states(5, 0))
        for n in range(4):
            x_hat, route = tower(z + n, torch.full((1,), 0.5), bank)
            kept.append((x_hat, route, x_hat.clone(), route.weights_BTJK.clone()))
    assert all(torch.equal(x_hat, then) and torch.equal(route.weights_BTJK, w) for x_hat, route, then, w in kept)


@pytest.mark.parametrize("steps", [1, 2, LEFT + 1, LEFT + 2, 12])
def test_a_picture_is_captured_only_where_enough_of_its_steps_are_left(steps: int) -> None:
    tower = small_tower()
    graphs = graphed(tower)
    drawn(tower, steps=steps, graphs=graphs)
    assert graphs.capture.captured == (steps >= LEFT + 2)
    assert graphs.replayed == (steps - 2 if steps >= LEFT + 2 else 0)
    for _ in range(OFTEN):
        drawn(tower, steps=steps, graphs=graphs)
    # What comes again and again is captured, however few steps a picture has; one of a single step gets there, too.
    assert graphs.capture.captured == 1


def test_only_the_last_used_graphs_are_kept() -> None:
    tower = small_tower()
    graphs = graphed(tower)
    for positive in range(3, 3 + KEPT):
        drawn(tower, positive, steps=LEFT + 2, bucket=None, graphs=graphs)
    drawn(tower, 3, steps=LEFT + 2, bucket=None, graphs=graphs)
    assert graphs.capture.captured == KEPT
    drawn(tower, 20, steps=LEFT + 2, bucket=None, graphs=graphs)
    before = graphs.replayed
    # The first was used again, the second is the one that was dropped.
    drawn(tower, 3, steps=LEFT + 2, bucket=None, graphs=graphs)
    assert graphs.replayed - before == LEFT + 2
    assert len(graphs._graphs) == KEPT
    drawn(tower, 4, steps=LEFT + 2, bucket=None, graphs=graphs)
    assert graphs.capture.captured == KEPT + 2


def test_feature_caching_and_what_is_recorded_within_are_drawn_eagerly_and_say_so() -> None:
    tower, other = small_tower(), small_tower()
    graphs = graphed(other)
    drawn(other, graphs=graphs)
    for options in ({"cache": 2}, {"record_options": RecordOptions(probabilities=True, regions=True)}):
        before = graphs.replayed
        one, expected = drawn(other, graphs=graphs, **options), drawn(tower, **options)
        check_same(one, expected)
        assert graphs.replayed == before
        assert graphs.reason is not None
    drawn(other, graphs=graphs)
    assert graphs.reason is None
    assert graphs.replayed == before + 12
    assert StepGraphs(None, "there is no CUDA device").note == "none: there is no CUDA device"


@pytest.mark.parametrize(
    ("wrong", "said"), [("raises", "not captured: no such thing"), ("differs", "a replay differs from the pass itself")]
)
def test_where_a_capture_fails_eager_goes_on_and_the_reason_is_kept(wrong: str, said: str) -> None:
    class Wrong(Recomputed):
        def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
            if wrong == "raises":
                self.captured += 1
                try:
                    raise RuntimeError("no such thing\nand more")
                finally:
                    # As where a capture ends after an error.
                    raise RuntimeError("the capture is invalid")
            result, replay = super().record(function)
            return result, lambda: (replay(), result[0].add_(1e-3))

    tower, other = small_tower(), small_tower()
    graphs = graphed(other, Wrong())
    for seed in (1, 2):
        check_same(drawn(other, seed=seed, graphs=graphs), drawn(tower, seed=seed))
    assert graphs.capture.captured == 1
    assert graphs.replayed == 0
    assert said in graphs.failure
    assert said in graphs.note


def test_an_error_of_the_pass_itself_is_no_failed_capture() -> None:
    tower = small_tower()
    graphs = graphed(tower)
    with torch.inference_mode():
        bank = tower.project_states(states(5, 0))
        for _ in range(3):
            with pytest.raises(RuntimeError):
                tower(torch.zeros(1, 4, 32, 24), torch.full((1,), 0.5), bank)
    assert graphs.failure is None


def test_kept_tables_outlive_the_shared_cache() -> None:
    layout, kept = (TokenSequence(3),), RotaryTables()
    with kept:
        table = rotary(layout, 16, 100.0, CPU)
    assert rotary(layout, 16, 100.0, CPU) is not table
    with kept:
        assert rotary(layout, 16, 100.0, CPU) is table


@pytest.mark.cuda
@pytest.mark.parametrize("bucket", [None, 16])
@pytest.mark.parametrize("variant", [*FIXED, *ROUTED], ids=name_of)
def test_cuda_graphs_are_the_passes_themselves(variant: dict[str, Any], bucket: int | None) -> None:
    device = torch.device("cuda")
    tower, other = (small_tower(**variant).to(device).bfloat16() for _ in range(2))
    capture = CudaCapture(device)
    # A small test on a busy card is no reason for the rule about memory.
    capture.check_memory = lambda: None
    graphs = graphed(other, capture)
    with torch.inference_mode():
        z, t_2 = torch.randn(2, 3, 32, 24, device=device), torch.full((2,), 0.5, device=device)
        for tokens in (6, 3, 6):
            banks = [tower.project_states(states(count, tokens).to(device)) for count in (tokens, 2)]
            bank = join(banks, bucket)
            for n in range(4):
                assert same(other(z + n, t_2, bank), tower(z + n, t_2, bank))
    assert graphs.failure is None
    assert graphs.replayed >= 5
