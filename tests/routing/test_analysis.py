"""What routes say in small: summaries, layers used, changes between steps, agreement between branches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mos_cli.routing.analysis import agreement, dead_layers, step_changes, strongest_layers, summarise
from mos_cli.routing.trace import (
    BranchSummary,
)


@st.composite
def decisions(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """Any ids [S, J, T, K] with weights above 0, and the number of layers."""
    layers = draw(st.integers(2, 9))
    shape = draw(arrays.array_shapes(min_dims=4, max_dims=4, max_side=4))
    ids = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, layers - 1)))
    weights = draw(arrays.arrays(np.float16, shape, elements=st.floats(2**-10, 1, width=16)))
    return ids, weights, layers


@given(decisions())
def test_summaries_keep_their_promises(drawn):
    ids, weights, layers = drawn
    summary = BranchSummary(**summarise(ids, weights, layers))
    mean, use, entropy = (np.array(v) for v in (summary.mean_layer_ST, summary.layer_use_JM, summary.entropy_S))
    assert mean.shape == (ids.shape[0], ids.shape[2])
    assert use.shape == (ids.shape[1], layers)
    assert entropy.shape == (ids.shape[0],)
    np.testing.assert_allclose(use.sum(axis=1), 1, atol=layers * 1e-4)
    assert (mean >= ids.min()).all()
    assert (mean <= ids.max()).all()
    assert (entropy >= 0).all()
    assert (entropy <= 1).all()
    chosen = {(index[1], int(layer)) for index, layer in np.ndenumerate(ids)}
    assert {(j, m) for j, m in np.argwhere(use > 0).tolist()} == chosen
    assert set(dead_layers(use.tolist())) == set(range(layers)) - {int(layer) for layer in ids.flat}


@given(decisions())
def test_summaries_equal_a_slow_count(drawn):
    ids, weights, layers = drawn
    summary = summarise(ids, weights, layers)
    use = np.zeros((ids.shape[1], layers))
    for index, layer in np.ndenumerate(ids):
        use[index[1], layer] += float(weights[index])
    np.testing.assert_allclose(summary["layer_use_JM"], use / use.sum(1, keepdims=True), atol=1.1e-4)
    last = ids.shape[0] - 1, slice(None), ids.shape[2] - 1
    expected = np.average(ids[last], weights=weights[last].astype(float))
    assert summary["mean_layer_ST"][-1][-1] == pytest.approx(expected, abs=1e-4)


@given(st.integers(2, 31))
def test_entropy_reaches_both_ends(layers):
    ids = np.zeros((2, 1, layers, 1), dtype=np.uint8)
    ids[1, 0, :, 0] = range(layers)
    assert summarise(ids, np.ones_like(ids, dtype=np.float16), layers)["entropy_S"] == (0.0, 1.0)


def test_a_rare_layer_is_not_a_dead_one():
    ids = np.zeros((100, 1, 100, 1), dtype=np.uint8)
    ids[0, 0, 0, 0] = 2
    use = summarise(ids, np.ones_like(ids, dtype=np.float16), 3)["layer_use_JM"]
    assert use == ((0.9999, 0.0, 0.0001),)
    assert dead_layers(use) == (1,)


def test_strongest_layers_come_in_order_and_dead_ones_never():
    assert strongest_layers([[0.6, 0.0, 0.4], [0.0, 0.0, 1.0]]) == ((2, 0.7), (0, 0.3))


def changes(ids: list[list[int]], weights: list[list[float]], slots: list[list[int]] | None = None) -> list[float]:
    """The changes of one token in one block; per step, the kept layers."""
    arrays = (None if values is None else np.array(values)[:, None, None] for values in (ids, weights, slots))
    return list(step_changes(*arrays))  # type: ignore[arg-type]


def test_changes_do_not_care_for_the_order_of_kept_layers():
    assert changes([[0, 1], [1, 0], [1, 2], [3, 4]], [[0.6, 0.4]] * 4) == [0.0, 0.5, 1.0]


def test_changes_are_shares_of_the_layers_that_are_read():
    """Places of weight 0 repeat the strongest layer: rules that leave fewer layers, and base models, have them."""
    pinned = [[1.0, 0.0, 0.0]]
    assert changes([[3, 3, 3], [4, 4, 4], [4, 4, 4]], pinned * 3) == [1.0, 0.0]
    assert changes([[3, 1, 3], [3, 2, 3]], [[0.6, 0.4, 0.0]] * 2) == [0.5]
    assert changes([[3, 3, 3], [3, 4, 5]], [*pinned, [0.5, 0.25, 0.25]]) == [0.6667]
    # Layer 3 was in a place of weight 0, and so was not read before.
    assert changes([[4, 3], [3, 4]], [[1.0, 0.0], [1.0, 0.0]]) == [1.0]


def test_a_layer_in_another_slot_is_a_change():
    assert changes([[3, 1], [3, 1]], [[0.5, 0.5]] * 2, [[0, 1], [1, 1]]) == [0.5]


def test_branches_agree_with_themselves_and_not_with_the_opposite():
    use = [[0.3333, 0.3333, 0.3333], [1.0, 0.0, 0.0]]
    assert agreement(use, use) == (1.0, 1.0)
    assert agreement(use, [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]) == (0.6667, 0.0)
