"""Settings that fit a GPU: which are found, which is the fastest, and what else is named where nothing fits."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.shapes import GenerationShape, UnderstandingShape
from mos_cli.config.settings import RunSettings, fitted, smaller
from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.planning import memory
from mos_cli.planning.candidates import GPU_SIZES, candidates, fastest, parse_quant
from mos_cli.planning.memory import GIB, Setting, stages, weights

SMALL = UnderstandingShape(layers=36, width=4096, hidden=1, linear=1, other=1, vision=0)
"""An understanding tower of next to no weights."""


@pytest.mark.parametrize("name", ["mos-s", "mos-l"])
def test_max_vram_chooses_what_the_plan_says(name: str) -> None:
    size = find_network(name).canvas.native
    for gib in GPU_SIZES:
        best = fastest(candidates(find_network(name), size), gib)
        chosen = fitted(RunSettings(max_vram=gib), find_network(name), size, None)
        assert (
            Setting(*parse_quant(chosen.quant), chosen.offload, chosen.tiled, chosen.batched_guidance) == best.setting
        )


def test_what_was_asked_for_is_kept_and_the_rest_chosen() -> None:
    size = find_network("mos-l").canvas.native
    kept = fitted(RunSettings(max_vram=24, offload="blocks"), find_network("mos-l"), size, "nf4")
    assert (kept.quant, kept.offload) == ("nf4", "blocks")
    with pytest.raises(MemoryLimitError, match="nothing fits 8 GiB"):
        fitted(RunSettings(max_vram=8), find_network("mos-l"), size, "none")
    with pytest.raises(UsageError):
        fitted(RunSettings(max_vram=8), find_network("mos-l"), size, "nf5")


def test_branches_are_computed_together_unless_that_does_not_fit() -> None:
    network = find_network("mos-l")
    size = network.canvas.native
    assert all(fastest(candidates(network, size), card).setting.batched_guidance for card in GPU_SIZES)
    # Large pictures of small towers: what is computed is most of what is needed.
    sizes: dict[str, Any] = {"width": 256, "heads": 2, "hidden": 4096, "depth": 2, "channels": 32, "patch": 1}
    shape = GenerationShape(**sizes, states_layers=37, states_width=4096)
    wide = replace(network, generation=shape, references=0, autoencoder=None, understanding=SMALL)
    found = [c for c in candidates(wide, (1024, 1024), quant=("none", "none")) if c.setting.offload == "none"]
    both, apart = (
        min(c.needs for c in found if c.setting.batched_guidance is batched_guidance)
        for batched_guidance in (True, False)
    )
    assert apart < both
    assert fastest(found, both / GIB).setting.batched_guidance
    assert not fastest(found, (both + apart) / 2 / GIB).setting.batched_guidance
    unguided = replace(wide, defaults=wide.defaults.model_copy(update={"cfg": 1.0}))
    assert all(c.setting.batched_guidance for c in candidates(unguided, (1024, 1024)))


def test_together_weights_are_unpacked_and_fetched_once_a_step() -> None:
    network = find_network("mos-l")
    found = {c.setting: c.seconds for c in candidates(network, network.canvas.native)}
    # Guidance acts on nine tenths of the steps.
    nf4, blocks = Setting(generation="nf4"), Setting(offload="blocks")
    nf4_apart, blocks_apart = (found[replace(setting, batched_guidance=False)] for setting in (nf4, blocks))
    assert nf4_apart["quantised layers"] == pytest.approx(1.9 * found[nf4]["quantised layers"])
    assert blocks_apart["waiting for blocks"] >= 1.9 * found[blocks]["waiting for blocks"]
    assert nf4_apart["drawing"] == found[nf4]["drawing"]
    # Every row is rounded, however many there are.
    int8 = Setting(generation="int8")
    assert found[int8] == found[replace(int8, batched_guidance=False)]


def test_a_run_in_full_precision_is_planned_as_such() -> None:
    size = find_network("mos-l").canvas.native
    half = fitted(RunSettings(max_vram=24), find_network("mos-l"), size, None)
    full = fitted(RunSettings(max_vram=24), find_network("mos-l", precision="fp32"), size, None)
    assert (half.quant, half.offload) != (full.quant, full.offload)
    assert fastest(candidates(find_network("mos-l", precision="fp32"), size), 24).quant == full.quant


def test_where_memory_ran_out_a_setting_is_named_that_needs_clearly_less() -> None:
    network = find_network("mos-l")
    size, now = network.canvas.native, Setting()
    every = {one.setting: one for one in candidates(network, size)}
    for card in (12, 24, None):
        found = smaller(find_network("mos-l"), size, now, card)
        assert found is not None
        assert found.peak < 0.9 * every[now].peak
        if card is not None:
            assert found.needs <= card * GIB
        else:
            assert found.setting.offload == "none"
    least = min(every.values(), key=lambda one: one.peak).setting
    assert smaller(find_network("mos-l"), size, least, 24) is None
    assert smaller(find_network("mos-l"), size, now, 1) is None


@pytest.mark.parametrize("name", ["mos-s", "mos-l"])
def test_what_is_chosen_fits_and_a_larger_card_is_no_slower(name: str) -> None:
    numbers = find_network(name)
    found = candidates(numbers, numbers.canvas.native)
    best = [fastest(found, card) for card in GPU_SIZES]
    assert all(c.needs <= card * GIB for c, card in zip(best, GPU_SIZES, strict=True))
    seconds = [c.total_seconds for c in best]
    assert all(later <= 1.08 * earlier for earlier, later in pairwise(seconds))
    assert [c.total_seconds for c in found] == sorted(c.total_seconds for c in found)


def test_what_is_spared_is_spared() -> None:
    """Quantising, offloading and tiles need less where they act, at the price that is named."""
    numbers = find_network("mos-l")

    def peaks(setting: Setting) -> dict[str, int]:
        return {stage.name: stage.peak for stage in stages(numbers, setting, (1024, 1024))}

    plain = peaks(Setting("none", "none", "none", False))
    evicted = peaks(Setting("none", "none", "understanding", False))
    blocks = peaks(Setting("none", "none", "blocks", False))
    tiled = peaks(Setting("none", "none", "none", True))
    tower = weights(numbers, Setting("none", "none", "none", False)).understanding
    assert plain["sample"] - evicted["sample"] == tower
    assert blocks["sample"] < evicted["sample"] / 4
    assert tiled["decode"] < plain["decode"]
    assert tiled["sample"] == plain["sample"]
    for quant in ("int8", "nf4"):
        assert peaks(Setting(quant, quant, "none", False))["encode"] < plain["encode"]  # type: ignore[arg-type]
    assert memory.host_bytes(numbers, Setting("none", "none", "none", False)) == 0
    assert memory.host_bytes(numbers, Setting("none", "none", "understanding", False)) > tower


def test_quant_is_for_both_or_for_each() -> None:
    assert parse_quant("nf4") == ("nf4", "nf4")
    assert parse_quant("int8,none") == ("int8", "none")
    with pytest.raises(UsageError):
        parse_quant("")
    numbers = find_network("mos-l")
    only = candidates(numbers, (1024, 1024), quant=("nf4", "none"))
    assert {(c.setting.understanding, c.setting.generation) for c in only} == {("nf4", "none")}
