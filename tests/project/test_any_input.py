"""Whatever a user's text or file holds, it is read, or refused as a user error: never another exception."""

import contextlib
import json
import tomllib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mos_cli.cli.prompts import read_prompts
from mos_cli.config.settings import Settings, load_preset, resolve
from mos_cli.errors import MosError
from mos_cli.images.masks import read_mask
from mos_cli.routing.rules import check_numbers, parse_rule, parse_target
from mos_cli.training.recipe import load_recipe, recipe_path
from tests.helpers.generated import many

CASES = pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.stress)])

VALUES = st.recursive(
    st.none().map(lambda _: "") | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
WRITTEN = (
    r'\A(red|\*|"red cat"|\[CLS\])(#[0-9]{1,5})?(=|!=|\+=|-=)([0-9.]{1,5}@)?[0-9,-]{1,8}'
    r"( (blocks|steps) [0-9,-]{1,5}){0,2}\Z"
)
TYPED = st.text(st.sampled_from("red cat*#=!+-@,.:0123456789\"'[] \t") | st.characters(), max_size=30)


def check(cases: int, strategy: st.SearchStrategy[Any], accepts: Callable[[Any], object]) -> None:
    """Passes generated values to a function, which may return or raise a MosError."""

    @many(cases)
    @given(strategy)
    def run(value: Any) -> None:
        with contextlib.suppress(MosError):
            accepts(value)

    run()


def toml(value: Any) -> str:
    """A value as TOML; a string, a list, a number or a boolean, whose JSON is TOML but for a few numbers."""
    text = json.dumps(value)
    return text.replace("NaN", "nan").replace("Infinity", "inf").replace("\x7f", r"\u007f")


def document(table: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, part in table.items():
        if isinstance(part, dict):
            lines += [f"[{name}]", *(f"{json.dumps(key)} = {toml(value)}" for key, value in part.items())]
        else:
            lines.insert(0, f"{name} = {toml(part)}")
    return "\n".join(lines)


@CASES
def test_route_rules(cases: int) -> None:
    def accepts(text: str) -> None:
        with contextlib.suppress(MosError):
            parse_target(text)
        rule = parse_rule(text)
        assert parse_rule(str(rule)) == rule
        check_numbers([rule], layers=7, blocks=6, steps=10)

    check(cases, TYPED | st.from_regex(WRITTEN), accepts)


@CASES
def test_config_files_and_presets(cases: int, cache, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.toml"
    names = st.sampled_from([*Settings.model_fields, "preset"]) | st.text(max_size=10)
    tables = st.dictionaries(names, VALUES, max_size=5)
    texts = tables.map(lambda table: document({"generate": table}).encode("utf-8", "surrogatepass"))

    def accepts(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(MosError):
            load_preset(str(path))
        resolve(Settings(), None)

    check(cases, texts | st.binary(max_size=200), accepts)


@CASES
@pytest.mark.parametrize("name", ["train-smoke", "train-emoji"])
def test_training_recipes(cases: int, tmp_path: Path, name: str) -> None:
    shipped = tomllib.loads(recipe_path(name).read_text(encoding="utf-8"))
    shipped.pop("stages", None)
    places = [(part, key) for part, table in shipped.items() if isinstance(table, dict) for key in (*table, None)]
    changes = st.lists(st.tuples(st.sampled_from(places), VALUES), min_size=1, max_size=3)
    path = tmp_path / "recipe.toml"

    def accepts(changes: list[tuple[tuple[str, str | None], Any]]) -> None:
        table = {part: dict(value) if isinstance(value, dict) else value for part, value in shipped.items()}
        for (part, key), value in changes:
            if key is None:
                table[part] = value
            elif isinstance(table[part], dict):
                table[part][key] = value
        path.write_bytes(document(table).encode("utf-8", "surrogatepass"))
        with contextlib.suppress(MosError):
            load_recipe(str(path), {"steps": 3})
        load_recipe(str(path))

    check(cases, changes, accepts)


SHAPES = ("stages = 3", "stages = [3]", "[[stages]]\nname = 1", "data = 3", "train = 3")


@pytest.mark.parametrize("text", [*SHAPES, "a = " + "[" * 10_000, "a = " + "9" * 5_000], ids=range(7))
def test_training_recipes_of_another_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(MosError):
        load_recipe(str(tmp_path / "recipe.toml"), {"steps": 3})


@CASES
def test_prompt_files(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"

    def accepts(data: bytes) -> None:
        path.write_bytes(data)
        prompts = read_prompts(f"@{path}", "what to draw")
        assert all(prompt and not prompt.startswith("#") for prompt in prompts)

    check(cases, st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8")), accepts)


@CASES
def test_masks(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"

    @st.composite
    def files(draw: st.DrawFn) -> bytes:
        mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F", "CMYK"]))
        kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
        size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        file = BytesIO()
        try:
            Image.new(mode, size, draw(st.integers(0, 1))).save(file, kind)
        except (OSError, ValueError, KeyError):
            return draw(st.binary(max_size=50))
        data = bytearray(file.getvalue())
        for _ in range(draw(st.integers(0, 3))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)

    def accepts(data: bytes) -> None:
        path.write_bytes(data)
        assert read_mask(path, (8, 8), invert=False, feather=1.0).size == (8, 8)

    check(cases, files(), accepts)
