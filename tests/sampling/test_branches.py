"""Branches computed in one pass are what they are alone: whatever their lengths, contexts, pictures and rules.

Shapes: as in `mos_cli.sampling.guidance`.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.bundles.bundle import Bundle
from mos_cli.images.outputs import png, read_drawing
from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.guidance import Branches, SteeringInput
from mos_cli.sampling.sampler import Step
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import VariableLengths
from mos_cli.towers.router import Steering, uniform_route
from tests.helpers.generation_towers import FIXED, ROUTED, WIDTHS, J, M, V, inputs, name_of, small_tower

TOKENS = {"positive": 6, "negative": 2, "unseen": 2}
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_rows_come_back_from_a_padded_batch(lengths: list[int], before: int, after: int) -> None:
    rows = [torch.randn(1, before + length + after, 2) for length in lengths]
    ragged = VariableLengths(tuple(lengths), first=before)
    joined = ragged.join(rows, fill=float("nan"))
    assert joined.shape == (len(lengths), before + max(lengths) + after, 2)
    assert all(torch.equal(ragged.row(joined, number), row) for number, row in enumerate(rows))


def banks(tower: GenerationTower) -> dict[str, StateBank]:
    """Of prompts of unlike lengths; where the tower takes pictures, the first two are with a picture."""
    made = {name: tower.project_states(inputs(1, tokens)[2]) for name, tokens in TOKENS.items()}
    if not tower.image_state_widths:
        return made
    references = tower.cache_references([torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(1))])
    image_states = torch.randn(1, V, M, max(WIDTHS), generator=torch.Generator().manual_seed(2))
    seeing = {name: tower.add_image_tokens(made[name], image_states, references) for name in ("positive", "negative")}
    return made | seeing


@torch.no_grad()
def step(
    tower: GenerationTower,
    batched_guidance: bool,
    record_options: RecordOptions = RecordOptions(),
    **steerings: SteeringInput,
) -> tuple[Step, Recorder]:
    """One step, as the sampler takes it, and what was recorded of it."""
    z, recorder = inputs(1)[0], Recorder(record_options)
    predict = Branches(tower, [banks(tower)], batched_guidance=batched_guidance)
    with recorder.attached(tower):
        x_hats, (routes,) = predict(tuple(TOKENS), z, 0.6, lambda picture, name: steerings.get(name))
        seen = Step(0, 1, 0.6, torch.cat(list(x_hats.values())), routes)
        recorder(seen)
    return seen, recorder


def same(
    tower: GenerationTower, record_options: RecordOptions = RecordOptions(), **steerings: SteeringInput
) -> tuple[Recorder, Recorder]:
    (one, recorded), (other, expected) = (
        step(tower, batched_guidance, record_options, **steerings) for batched_guidance in (True, False)
    )
    torch.testing.assert_close(one.x_hat_BCHW, other.x_hat_BCHW, **CLOSE)
    assert list(one.routes) == list(other.routes) == list(TOKENS)
    for name, route in other.routes.items():
        assert torch.equal(one.routes[name].ids_BTJK, route.ids_BTJK)
        torch.testing.assert_close(one.routes[name].weights_BTJK, route.weights_BTJK, **CLOSE)
        assert recorded.changed(name) == expected.changed(name)
    return recorded, expected


@pytest.mark.parametrize("variant", [*FIXED, *ROUTED], ids=name_of)
@pytest.mark.parametrize("widths", [(), WIDTHS], ids=["words", "pictures"])
def test_a_branch_is_what_it_is_alone(variant: dict[str, Any], widths: tuple[int, ...]) -> None:
    same(small_tower(**variant, image_state_widths=widths))


def test_branches_with_the_same_pictures_share_a_pass() -> None:
    def rows_of(widths: tuple[int, ...], batched_guidance: bool) -> list[int]:
        tower, rows = small_tower(image_state_widths=widths), []
        tower.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        step(tower, batched_guidance)
        return rows

    assert rows_of((), True) == [3]
    assert rows_of(WIDTHS, True) == [2, 1]
    assert rows_of((), False) == rows_of(WIDTHS, False) == [1, 1, 1]


def test_rules_of_one_branch_leave_the_others_alone() -> None:
    tower, T = small_tower(), TOKENS["negative"]
    allowed = torch.ones(1, T, J, M, dtype=torch.bool)
    allowed[:, 0, :, 1:] = False
    same(tower, negative=Steering(allowed))
    bias = torch.zeros(1, T, J, M)
    bias[:, 1, :, 2] = 9.0
    same(tower, negative=Steering(torch.ones_like(allowed), bias))
    order = torch.arange(M).flip(0).expand(J, M)
    shuffled = {name: Steering(torch.ones(1, T, J, M, dtype=torch.bool), None, order) for name, T in TOKENS.items()}
    same(tower, **shuffled)
    same(tower, **dict.fromkeys(TOKENS, uniform_route([[M - 1]] * J, torch.device("cpu"))))


@torch.no_grad()
def test_rules_are_joined_anew_only_where_they_change() -> None:
    tower, said = small_tower(), []
    predict = Branches(
        lambda *asked, steering, guidance_B: (said.append(steering), tower(*asked))[1],
        [banks(tower)],
        batched_guidance=True,
    )
    one, other = (Steering(torch.ones(1, TOKENS["negative"], J, M, dtype=torch.bool)) for _ in range(2))
    for steering in (one, one, other):
        steer = {"positive": None, "negative": steering}.get
        predict(("positive", "negative"), inputs(1)[0], 0.6, lambda picture, name, steer=steer: steer(name))
    assert said[0] is said[1]
    assert said[1] is not said[2]


@pytest.mark.parametrize("context", ["kv", "tokens", "cross"])
def test_what_is_recorded_is_the_same(context: Any) -> None:
    record_options = RecordOptions(probabilities=True, regions=True)
    recorded, expected = same(small_tower(context=context, image_state_widths=WIDTHS), record_options)
    ours, theirs = recorded.routes(), expected.routes()
    for name, tokens in TOKENS.items():
        tokens += V if name != "unseen" else 0
        assert ours[name].probabilities_SJTM.shape == (1, J, tokens, M)
        assert ours[name].regions_JTN.shape == (J, tokens, 12)
        for kind in ("probabilities_SJTM", "regions_JTN"):
            seen, alone = (torch.from_numpy(getattr(routes[name], kind)) for routes in (ours, theirs))
            torch.testing.assert_close(seen, alone, atol=2e-3, rtol=0)


def test_a_replay_computes_the_branches_as_the_record_says(mos, bundle: Bundle, tmp_path, monkeypatch) -> None:
    rows, forward = [], GenerationTower.forward

    def counted(tower: GenerationTower, z_BCHW: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        rows.append(len(z_BCHW))
        return forward(tower, z_BCHW, *inputs, **options)

    monkeypatch.setattr(GenerationTower, "forward", counted)
    assert mos("generate", "a red apple", "-s", 1, "--steps", 2, "-o", tmp_path / "a.png").exit_code == 0
    image, record = read_drawing(tmp_path / "a.png")
    assert (record.made.batched_guidance, rows) == (True, [2, 2])
    rows.clear()
    sequential = record.model_copy(update={"made": record.made.model_copy(update={"batched_guidance": False})})
    (tmp_path / "sequential.png").write_bytes(png(image, sequential))
    assert mos("replay", tmp_path / "sequential.png", "-o", tmp_path / "b.png").exit_code == 0
    assert (read_drawing(tmp_path / "b.png")[1].made.batched_guidance, rows) == (False, [1, 1, 1, 1])
