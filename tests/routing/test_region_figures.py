"""Regions and figures: which patch read which word, through which layer, and what is drawn of it."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mos_cli.config.recipe import pixels_hash
from mos_cli.routing.regions import patch_origins, special_share, word_maps
from mos_cli.routing.section import cut
from mos_cli.routing.trace import Recording, RegionGrid, trace_files
from mos_cli.utils.files import write_all
from tests.helpers.traces import BLOCKS, LAYERS, make_trace

ROWS, COLUMNS = 2, 3
APPLE, WORDS, SPECIAL = 3, (1, 2, 3), (0, 4)


def recorded(folder: Path, **sizes) -> Recording:
    """A trace with regions on the disk; the special tokens collect much attention, as they do."""
    trace, routes = make_trace(**sizes)
    rng = np.random.default_rng(3)
    for name, held in routes.items():
        attention = rng.random((BLOCKS, held.ids_SJTK.shape[2], ROWS * COLUMNS)) / 50
        attention[:, 0] += 0.3
        routes[name] = replace(held, regions_JTN=attention.astype(np.float16))
    picture = Image.new("RGB", (12, 8), "red")
    grid = RegionGrid(rows=ROWS, columns=COLUMNS)
    trace = trace.model_copy(update={"regions": grid, "picture": pixels_hash(picture)})
    path = folder / "apple.json"
    picture.save(path.with_suffix(".png"))
    write_all(trace_files(trace, routes, path), overwrite=True)
    return Recording(path, trace, routes, None, None)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return recorded(tmp_path)


def regions_of(recording: Recording) -> np.ndarray:
    assert recording.routes is not None
    regions_JTN = recording.routes["positive"].regions_JTN
    assert regions_JTN is not None
    return regions_JTN.astype(float)


def test_a_map_is_the_mean_over_the_blocks_asked_for(recording):
    section = cut(recording, "positive", None, "1:2")
    apple = next(word for word in section.words if word.text == "apple")
    (word_map,) = word_maps(section, [apple])
    regions = regions_of(recording)
    for row in range(ROWS):
        for column in range(COLUMNS):
            mean = regions[1:3, APPLE, row * COLUMNS + column].mean()
            assert word_map.attention[row, column] == pytest.approx(mean, rel=1e-4)
    use = np.zeros(LAYERS)
    routes = section.decisions
    for place in np.ndindex(routes.ids_SJTK.shape):
        use[routes.ids_SJTK[place]] += routes.weights_SJTK[place] * (place[2] == APPLE)
    assert [layer for layer, _ in word_map.layers] == (-use).argsort()[:2].tolist()
    assert [share for _, share in word_map.layers] == pytest.approx(sorted(use / use.sum())[:-3:-1])


@pytest.mark.parametrize("patch", [(0, 0), (1, 2), (0, 1)])
def test_a_patch_came_from_its_words_through_their_layers(recording, patch):
    section = cut(recording, "positive")
    regions, routes = regions_of(recording), section.decisions
    seen = regions[:, :, patch[0] * COLUMNS + patch[1]]
    origins = patch_origins(section, patch)
    assert [origin.word.special for origin in origins] == [False] * len(WORDS) + [True] * len(SPECIAL)
    assert sum(origin.of_words or 0 for origin in origins) == pytest.approx(1)
    shares = [origin.attention for origin in origins if not origin.word.special]
    assert shares == sorted(shares, reverse=True)
    for origin in origins:
        (token,) = origin.word.tokens
        assert origin.attention == pytest.approx(seen[:, token].mean())
        assert (origin.of_words is None) == (token in SPECIAL)
        through = np.zeros(LAYERS)
        for block in range(BLOCKS):
            used = np.zeros(LAYERS)
            for step, k in np.ndindex(routes.ids_SJTK.shape[0], routes.ids_SJTK.shape[3]):
                used[routes.ids_SJTK[step, block, token, k]] += routes.weights_SJTK[step, block, token, k]
            through += seen[block, token] * used / used.sum()
        assert origin.layer == through.argmax()
        assert origin.part == pytest.approx(through.max() / through.sum())


def test_the_table_of_a_patch(mos, recording):
    result = mos("inspect-routing", recording.path, "--patch", "1,2", "--patch", "0,0")
    assert result.exit_code == 0
    first, *_ = patch_origins(cut(recording, "positive"), (1, 2))
    told = f"patch (1, 2) came most from {first.word.text} through layer {first.layer}"
    name = recording.trace.layers[first.layer]
    assert f"{told}\n" in result.stdout if name == f"layer {first.layer}" else f"{told} ({name})\n" in result.stdout
    assert "patch (0, 0) came most from" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if "special" in row] == ["[CLS]", "[SEP]"] * 2
    assert max(map(len, result.stdout.splitlines())) <= 80
    facts = json.loads(mos("inspect-routing", recording.path, "--patch", "1,2", "--json").stdout)
    (patch,) = facts["patches"]
    assert (patch["patch"], patch["origins"][0]["word"]) == ([1, 2], first.word.text)
    assert patch["origins"][0]["nth"] == first.word.nth
    one = mos("inspect-routing", recording.path, "--patch", "1,2", "-w", "red").stdout
    assert told in one
    assert [line.split()[0] for line in one.splitlines()[3:]] == ["red"]


def test_special_tokens_are_told_apart(recording):
    share, names = special_share(cut(recording, "positive"))
    regions = regions_of(recording)
    assert names == ("[CLS]", "[SEP]")
    assert share == pytest.approx(regions[:, list(SPECIAL)].sum() / regions.sum())


@pytest.mark.parametrize("option", ["--plot", "--regions"])
@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_figures_are_written_whole_and_alike(mos, recording, tmp_path, option, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    # Its oldest release warns when it is imported.
    pytest.importorskip("matplotlib.pyplot")
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = mos("inspect-routing", recording.path, option, file)
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{file}\n", "")
    first, second = (file.read_bytes() for file in files)
    assert first == second, "a date or chance is in the figure"
    if suffix == ".pdf":
        assert first.startswith(b"%PDF")
        assert b"/Type3" not in first, "journals refuse bitmap fonts"
    else:
        with Image.open(files[0]) as figure:
            assert figure.width >= 1500
    assert mos("inspect-routing", recording.path, option, files[0]).exit_code == 3
    assert mos("inspect-routing", recording.path, option, files[0], "--overwrite").exit_code == 0


def test_a_plot_can_be_svg_and_words_can_hold_anything(mos, tmp_path):
    trace, routes = make_trace(prompt="costs $5 and $6 <b> & \\frac")
    write_all(trace_files(trace, routes, tmp_path / "x.json"))
    result = mos("inspect-routing", tmp_path / "x.json", "--plot", tmp_path / "x.svg", "--step", "1:3", "--block", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def refusals(recording: Recording) -> dict[str, tuple[list[object], int, str]]:
    beside = recording.path.with_name
    return {
        "plot suffix": (["--plot", beside("x.gif")], 2, ".png, .pdf or .svg"),
        "regions suffix": (["--regions", beside("x.svg")], 2, ".png or .pdf"),
        "patch text": (["--patch", "3"], 2, "--patch '3' is no patch: write ROW,COLUMN"),
        "patch place": (["--patch", "2,0"], 2, "there are rows 0 to 1 and columns 0 to 2"),
        "steps of regions": (["--patch", "1,1", "--step", "1"], 2, "leave --step out"),
        "word": (["--regions", beside("x.png"), "-w", "pear"], 2, "'pear' is not a word"),
        "compare alone": (["--compare", recording.path], 2, "add --html FILE"),
        "html and a word": (["--html", beside("x.html"), "-w", "red"], 2, "--word has no effect on --html"),
    }


@pytest.mark.parametrize("name", refusals(Recording(Path("x"), *make_trace(), None, None)))
def test_mistakes_are_one_line(mos, recording, name):
    arguments, code, message = refusals(recording)[name]
    result = mos("inspect-routing", recording.path, *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert message in result.stderr
    assert not [file for file in recording.path.parent.iterdir() if file.name.startswith("x.")]


def test_without_regions_it_says_how_to_have_them(mos, tmp_path, monkeypatch):
    trace, routes = make_trace()
    path = tmp_path / "plain.json"
    write_all(trace_files(trace, routes, path))
    for arguments in (["--patch", "0,0"], ["--regions", tmp_path / "r.png"]):
        result = mos("inspect-routing", path, *arguments)
        assert (result.exit_code, result.stderr) == (
            3,
            f"error: {path} has no regions: draw with --regions to record them\n",
        )
    write_all(trace_files(trace, None, tmp_path / "summary.json"))
    result = mos("inspect-routing", tmp_path / "summary.json", "--plot", tmp_path / "p.png")
    assert (result.exit_code, "--trace topk" in result.stderr) == (3, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = mos("inspect-routing", path, "--plot", tmp_path / "p.png")
    assert (result.exit_code, "pip install 'mos-cli[inspect]'" in result.stderr) == (2, True)


def test_too_many_words_for_a_figure(mos, tmp_path):
    recording = recorded(tmp_path, prompt=" ".join(f"word{number}" for number in range(30)))
    result = mos("inspect-routing", recording.path, "--regions", tmp_path / "r.png")
    assert (result.exit_code, "choose at most 24 with --word" in result.stderr) == (2, True)


def test_the_report_is_written_from_one_trace_or_two(mos, recording, tmp_path):
    for other in ([], ["--compare", recording.path]):
        file = tmp_path / f"report{len(other)}.html"
        result = mos("inspect-routing", recording.path, "--html", file, *other)
        assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.stderr
        assert "<html" in file.read_text(encoding="utf-8")
        assert mos("inspect-routing", recording.path, "--html", file, *other).exit_code == 3
