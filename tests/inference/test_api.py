"""The Python interface draws what the command line draws, from the same settings, and refuses what it refuses."""

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mos_cli
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.images.outputs import read_drawing
from mos_cli.inference.model import Model
from mos_cli.routing.trace import load_recording
from mos_cli.utils.threads import SPIN_VARIABLES

API = Path(__file__).parents[2] / "docs" / "api.md"
PROMPT = "a red apple"


@pytest.fixture
def model(editor) -> Model:
    return mos_cli.load("editor")


def stored(path: Path) -> list[bytes]:
    """The bytes of a picture, its trace's head and its arrays; the head names its arrays' file."""
    heads = [path, path.with_suffix(".json"), path.with_suffix(".routing.safetensors")]
    return [file.read_bytes().replace(path.stem.encode(), b"NAME") for file in heads]


def test_generate_draws_what_the_command_line_draws(mos, model: Model, tmp_path: Path) -> None:
    typed = ("--steps", 4, "--solver", "euler", "--cfg", 3, "--cfg-interval", "0.2,0.9", "--negative", "a dog")
    typed += ("--size", "48x16", "--route", "apple=1,2 blocks 1")
    assert mos("generate", f" {PROMPT}", "-s", 3, *typed, "-o", tmp_path / "typed.png").exit_code == 0
    picture = model.generate(
        f" {PROMPT}",
        seed=3,
        steps=4,
        solver="euler",
        cfg=3,
        cfg_interval=(0.2, 0.9),
        negative="a dog",
        size=(48, 16),
        routes=["apple=1,2 blocks 1"],
    )
    picture.save(tmp_path / "called.png")
    assert stored(tmp_path / "called.png") == stored(tmp_path / "typed.png")


def test_defaults_are_those_of_the_command_line(mos, model: Model, tmp_path: Path) -> None:
    assert mos("generate", PROMPT, "-s", 3, "-o", tmp_path / "typed.png").exit_code == 0
    model.generate(PROMPT, seed=3).save(tmp_path / "called.png")
    assert stored(tmp_path / "called.png") == stored(tmp_path / "typed.png")


def test_the_users_settings_do_not_change_what_a_notebook_draws(model: Model, tmp_path: Path, monkeypatch) -> None:
    before = model.generate(PROMPT, seed=3).record
    (tmp_path / "config.toml").write_text("[generate]\nsteps = 7\n")
    monkeypatch.setenv("MOS_STEPS", "8")
    assert mos_cli.load("editor").generate(PROMPT, seed=3).record == before


def test_edit_draws_what_the_command_line_draws(mos, model: Model, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((40, 24)).save(tmp_path / "mask.png")
    Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 20).save(tmp_path / "in.png")
    typed = ("--strength", 0.7, "--image-cfg", 1.5, "--mask", tmp_path / "mask.png", "--invert-mask", "--feather", 2)
    typed += ("-r", tmp_path / "mask.png", "--max-pixels", 900)
    drawn = mos("edit", tmp_path / "in.png", "a cat", "-s", 5, *typed, "-o", tmp_path / "typed.png")
    assert drawn.exit_code == 0, drawn.stderr
    with Image.open(tmp_path / "in.png") as image, Image.open(tmp_path / "mask.png") as mask:
        for source, allowed in ((tmp_path / "in.png", str(tmp_path / "mask.png")), (image, mask)):
            edited = model.edit(
                source,
                "a cat",
                references=[allowed],
                mask=allowed,
                invert_mask=True,
                feather=2,
                strength=0.7,
                image_cfg=1.5,
                max_pixels=900,
                seed=5,
            )
            edited.save(tmp_path / "called.png", overwrite=True)
            assert stored(tmp_path / "called.png") == stored(tmp_path / "typed.png")


def test_what_may_be_several_may_be_one(model: Model, tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((40, 24)).save(tmp_path / "a.png")
    for one in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        edits = [model.edit(one, "a cat", seed=5, references=given) for given in (one, [one])]
        assert edits[0].record == edits[1].record
    pictures = [model.generate(PROMPT, seed=3, routes=given) for given in ("*!=0", ["*!=0"])]
    assert pictures[0].record == pictures[1].record
    with pytest.raises(InputError, match=r"no\.safetensors"):
        mos_cli.load("editor", loras="no.safetensors")


def test_a_chain_of_results_is_replayed_from_its_last_picture(mos, model: Model, tmp_path: Path) -> None:
    first = model.generate(PROMPT, seed=3)
    second = model.edit(first, "a green apple", seed=4, composite=True)
    model.edit(second, "a cat", seed=5).save(tmp_path / "last.png")
    verified = mos("replay", tmp_path / "last.png", "--verify")
    assert (verified.exit_code, verified.stdout.strip()) == (0, "exact")


def test_the_trace_is_arrays(model: Model, tmp_path: Path) -> None:
    picture = model.generate(PROMPT, seed=3, steps=4, cfg_interval=(0.5, 1), probabilities=True, regions=True)
    layers, tokens = len(picture.trace.layers), ["[CLS]", "a", "red", "apple", "[SEP]"]
    assert [token.text for token in picture.trace.branches["positive"].tokens] == tokens
    for name, steps, width in (("positive", 4, 5), ("negative", 3, 2)):
        routes = picture.routes[name]
        assert picture.trace.branches[name].steps == tuple(range(steps))
        shape = (steps, picture.trace.blocks, width)
        assert (routes.ids_SJTK.shape, routes.ids_SJTK.dtype) == ((*shape, 2), np.uint8)
        assert (routes.weights_SJTK.shape, routes.weights_SJTK.dtype) == ((*shape, 2), np.float16)
        assert np.allclose(routes.weights_SJTK.sum(axis=-1), 1, atol=1e-3)
        assert routes.probabilities_SJTM is not None
        assert routes.probabilities_SJTM.shape == (*shape, layers)
        best_SJT = routes.probabilities_SJTM.argmax(axis=-1)
        assert (best_SJT == routes.ids_SJTK[..., 0]).mean() > 0.99
        assert routes.regions_JTN is not None
        assert routes.regions_JTN.shape[:2] == (picture.trace.blocks, width)
    picture.save(tmp_path / "one.png")
    loaded = load_recording(tmp_path / "one.png")
    assert loaded.routes is not None
    assert (loaded.routes["positive"].ids_SJTK == picture.routes["positive"].ids_SJTK).all()


def test_the_routes_of_another_picture_are_followed(mos, model: Model, tmp_path: Path) -> None:
    source = model.generate(PROMPT, seed=3, steps=4)
    source.save(tmp_path / "source.png")
    follower = model.generate(PROMPT, seed=9, steps=4, route_from=tmp_path / "source.png", route_until=0.5)
    ids = [one.routes["positive"].ids_SJTK for one in (source, follower)]
    assert all(set(a) == set(b) for a, b in zip(ids[0][:2].reshape(-1, 2), ids[1][:2].reshape(-1, 2), strict=True))
    typed = ("--route-from", tmp_path / "source.png", "--route-until", "50%", "-o", tmp_path / "typed.png")
    assert mos("generate", PROMPT, "-s", 9, "--steps", 4, *typed).exit_code == 0
    assert read_drawing(tmp_path / "typed.png")[1] == follower.record


def test_save_overwrites_nothing_unless_told(model: Model, tmp_path: Path) -> None:
    picture = model.generate(PROMPT, seed=3, steps=1, previews=True)
    assert [file.name for file in picture.save(tmp_path / "one.png")] == [
        "one.png",
        "one.json",
        "one.routing.safetensors",
        "one.steps.webp",
    ]
    with pytest.raises(InputError, match=r"one\.png"):
        picture.save(tmp_path / "one.png")
    other = model.generate(PROMPT, seed=4, steps=1)
    other.save(tmp_path / "one.png", trace="off", overwrite=True)
    assert [file.name for file in tmp_path.glob("one.*")] == ["one.png"]
    assert other.save(tmp_path / "two.png", trace="summary")[1:] == [tmp_path / "two.json"]
    with pytest.raises(UsageError, match=r"\.png"):
        picture.save(tmp_path / "one.tiff")


def test_mistakes_raise_the_documented_errors(model: Model, tmp_path: Path) -> None:
    mistakes = {
        (UsageError, "--steps"): lambda: model.generate(PROMPT, steps=0),
        (UsageError, "--solver"): lambda: model.generate(PROMPT, solver="heun"),
        (UsageError, "multiples of 8"): lambda: model.generate(PROMPT, size=(33, 33)),
        (UsageError, "seed"): lambda: model.generate(PROMPT, seed=-1),
        (UsageError, "no effect at cfg 1"): lambda: model.generate(PROMPT, cfg=1, negative="a dog"),
        (UsageError, "layer"): lambda: model.generate(PROMPT, routes=["apple=99"]),
        (UsageError, "--route-from"): lambda: model.generate(PROMPT, route_until=0.5),
        (UsageError, "exclude"): lambda: model.edit(tmp_path / "a.png", PROMPT, size=(32, 32), max_pixels=900),
        (InputError, "empty"): lambda: model.generate("  "),
        (InputError, "cannot read"): lambda: model.edit(tmp_path / "none.png", PROMPT),
        (ModelError, "no model"): lambda: mos_cli.load("nothing"),
        (ModelError, "only draws"): lambda: mos_cli.load("tiny").edit(tmp_path / "a.png", PROMPT),
        (UsageError, "--quant"): lambda: mos_cli.load("editor", quant="int3"),
        (UsageError, "needs a GPU"): lambda: mos_cli.load("editor", device="cpu", max_vram=8),
    }
    for (kind, words), call in mistakes.items():
        with pytest.raises(kind, match=words):
            call()


def test_memory_auto_loads_what_fits(editor) -> None:
    model = mos_cli.load("editor", device="cpu", max_vram="auto")
    assert model.generate(PROMPT, seed=3).record.recipe.quant is None


def test_a_notebook_shows_pictures_in_few_words(model: Model) -> None:
    picture = model.generate(PROMPT, seed=3, size="48x32")
    assert picture.image.size == (48, 32)
    assert repr(picture) == f"<Drawing of '{PROMPT}', seed 3, 48x32>"
    assert repr(model) == f"<Model editor on {model.pipeline.device}>"
    shown = picture._repr_png_()
    assert shown is not None
    assert Image.open(BytesIO(shown)).tobytes() == picture.image.tobytes()


@pytest.mark.slow
def test_loading_prints_nothing_and_its_threads_do_not_spin(editor) -> None:
    """In a process of its own, as PyTorch and its companions print when they are first imported."""
    script = (
        "import mos_cli, os; mos_cli.load('editor', device='cpu'); print(os.environ['GOMP_SPINCOUNT'], dir(mos_cli))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in (*SPIN_VARIABLES, "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("10000 ['__version__', 'load']\n", "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "PIL", "typer")
    script = f"import mos_cli, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_in_the_documents_runs(mos, editor, tmp_path: Path, monkeypatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", API.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace('"emoji"', '"editor"'), str(API), "exec"), {})
    verified = mos("replay", "green.png", "--verify")
    assert (verified.exit_code, verified.stdout.strip()) == (0, "exact")
