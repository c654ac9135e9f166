"""The interface of the server: pictures in OpenAI's form, edits, rules, traces, replays."""

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from mos_cli.config.job_line import JobLine
from mos_cli.config.recipe import PictureRecord
from mos_cli.images.outputs import read_drawing
from mos_cli.routing.trace import load_recording
from mos_cli.server.bodies import EditBody
from tests.helpers.running_server import Answer, RunningServer, running_server

GENERATIONS, EDITS, REPLAYS = "/v1/images/generations", "/v1/images/edits", "/v1/images/replays"


def pictures(answer: Answer) -> list[tuple[bytes, Image.Image, PictureRecord]]:
    assert answer.status == 200, answer.body
    files = [base64.b64decode(one["b64_json"]) for one in answer.json["data"]]
    return [(file, *read_drawing(BytesIO(file))) for file in files]


def generated(server: RunningServer, **more) -> bytes:
    body = {"prompt": "a red dog", "seed": 3, "steps": 2} | more
    return pictures(server.ask("POST", GENERATIONS, body))[0][0]


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_pictures_are_those_of_the_command(server: RunningServer, mos, tmp_path: Path, monkeypatch) -> None:
    body = {"prompt": "a {red|green} dog", "n": 2, "size": "24x16", "seed": 3, "steps": 2, "cfg": 3}
    answer = server.ask("POST", GENERATIONS, body)
    monkeypatch.chdir(tmp_path)
    line = ("generate", body["prompt"], "-n", 2, "--size", "24x16", "-s", 3, "--steps", 2, "--cfg", 3)
    assert mos(*line, "-o", "{seed}.png").exit_code == 0
    assert [file for file, _, _ in pictures(answer)] == [Path(name).read_bytes() for name in ("3.png", "4.png")]
    assert answer.json["size"] == "24x16"
    assert answer.json["output_format"] == "png"
    assert [one["seed"] for one in answer.json["data"]] == [3, 4]
    assert list(tmp_path.joinpath("cache").glob("*.png")) == []


def test_openai_fields(server: RunningServer) -> None:
    body = {"model": "editor", "prompt": "a dog", "n": 1, "size": "auto", "quality": "auto", "user": "me"}
    ((_, image, _),) = pictures(server.ask("POST", GENERATIONS, body | {"response_format": "b64_json"}))
    assert image.size == (32, 32)
    data = server.ask("POST", GENERATIONS, body | {"output_format": "jpeg"}).json["data"][0]["b64_json"]
    assert base64.b64decode(data)[:2] == b"\xff\xd8"
    assert server.ask("GET", "/v1/models").json["data"][0]["id"] == "editor"


def test_what_is_wrong_is_told(server: RunningServer) -> None:
    cases = [
        ({"model": "gpt-image-1"}, "editor"),
        ({"size": "1000x1000"}, "multiples"),
        ({"size": "big"}, "big"),
        ({"n": 11}, "n:"),
        ({"n": 0}, "n:"),
        ({"steps": 1001}, "steps:"),
        ({"seed": -1}, "seed:"),
        ({"seed": 2**64}, "seed:"),
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"colour": "red"}, "colour"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "a {red"}, "closed"),
        ({"routes": ["dog=99"]}, "dog=99"),
        ({"routes": "cat=1"}, "cat"),
        ({"preset": "../../etc/passwd"}, "preset"),
        ({"preset": "/tmp/my.toml"}, "preset"),
        ({"preset": "cpu"}, "preset"),
        ({"loras": ["/tmp/a.safetensors"]}, "loras"),
        ({"output": "/tmp/a.png"}, "output"),
        ({"prompt": "__../../secret__ dog", "routes": ["nowhere=1"]}, "nowhere"),
    ]
    for change, told in cases:
        answer = server.ask("POST", GENERATIONS, {"prompt": "a dog", "steps": 1} | change)
        assert answer.status in (400, 409)
        assert told in answer.message, (told, answer.message)
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert len(answer.message.splitlines()) == 1


def test_a_model_that_does_not_edit_says_so(bundle) -> None:
    with running_server() as server:
        answer = server.form(EDITS, ("image", png(Image.new("RGB", (32, 32)))), ("prompt", "a dog"))
        assert (answer.status, "edit" in answer.message) == (400, True)


def test_edits_are_those_of_the_command(server: RunningServer, mos, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "teal").save("photo.png")
    mask = Image.new("L", (40, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save("mask.png")
    line = ("edit", "photo.png", "a red dog", "-s", 3, "--steps", 2, "--mask", "mask.png", "--feather", 2)
    assert mos(*line, "-o", "edited.png").exit_code == 0
    answer = server.form(
        EDITS,
        ("image[]", Path("photo.png").read_bytes()),
        ("mask", Path("mask.png").read_bytes()),
        *{"prompt": "a red dog", "seed": 3, "steps": 2, "feather": 2}.items(),
    )
    ((file, _, record),) = pictures(answer)
    assert file == Path("edited.png").read_bytes()
    assert record.recipe.edit is not None


def test_pictures_are_expanded_as_by_the_command(server: RunningServer, mos, tmp_path: Path) -> None:
    photo = png(Image.new("RGB", (32, 24), "teal"))
    (tmp_path / "photo.png").write_bytes(photo)
    edit = ("edit", tmp_path / "photo.png", "a dog", "-s", 1, "--steps", 1, "--trace", "off")
    assert mos(*edit, "--expand", "left=8,top=8", "-o", tmp_path / "a.png").exit_code == 0
    fields = (("image", photo), ("prompt", "a dog"), ("seed", 1), ("steps", 1))
    answer = server.form(EDITS, *fields, ("expand", "left=8,top=8"), ("trace", "off"))
    data = pictures(answer)[0][0]
    assert data == (tmp_path / "a.png").read_bytes()
    assert pictures(server.form(REPLAYS, ("image", data), ("input", photo), ("trace", "off")))[0][0] == data
    for wrong in ("left", "left=-1", "left=99999"):
        answer = server.form(EDITS, *fields, ("expand", wrong))
        assert (answer.status, "expand" in answer.message) == (400, True)


def test_where_a_mask_of_openai_is_transparent_may_change(server: RunningServer) -> None:
    photo = Image.new("RGB", (32, 32), "teal")
    mask = Image.new("RGBA", (32, 32), "black")
    mask.paste((0, 0, 0, 0), (16, 0, 32, 32))
    parts = {"prompt": "a dog", "seed": 1, "steps": 1}.items()
    ((_, image, _),) = pictures(server.form(EDITS, ("image", png(photo)), ("mask", png(mask)), *parts))
    assert image.crop((0, 0, 16, 32)).tobytes() == photo.crop((0, 0, 16, 32)).tobytes()
    assert image.tobytes() != photo.tobytes()


def test_what_is_wrong_with_an_edit_is_told(server: RunningServer) -> None:
    cases = [
        ([("prompt", "a dog")], "image"),
        ([("image", b"no picture"), ("prompt", "a dog")], "image is not a PNG"),
        ([("image", png(Image.new("RGB", (32, 32)))), ("mask", b"none"), ("prompt", "a dog")], "mask is not a PNG"),
        ([("image", png(Image.new("RGB", (32, 32))))], "prompt"),
        ([("image", png(Image.new("RGB", (32, 32)))), ("prompt", "a dog"), ("other", b"x")], "image"),
        ([("image", "a.png"), ("prompt", "a dog")], "image"),
        ([("image", png(Image.new("RGB", (32, 32))))] * 11 + [("prompt", "a dog")], "10"),
    ]
    for parts, told in cases:
        answer = server.form(EDITS, *parts)
        assert answer.status == 400
        assert told in answer.message, (told, answer.message)


def test_rules_and_traces(server: RunningServer, tmp_path: Path) -> None:
    answer = server.ask("POST", GENERATIONS, {"prompt": "a red dog", "steps": 2, "routes": ["dog=1"]})
    job = answer.json["data"][0]["job"]
    for name, part in {"a.png": "picture", "a.json": "trace", "picture.routing.safetensors": "routes"}.items():
        (tmp_path / name).write_bytes(server.ask("GET", f"/v1/jobs/{job}/{part}").body)
    assert load_recording(tmp_path / "a.png").trace.recipe.routes == ("dog=1",)
    routing = server.ask("GET", f"/v1/jobs/{job}/routing").json
    assert [word["text"] for word in routing["words"]] == ["a", "red", "dog"]
    assert routing["rules"] == ["dog=1"]
    for word in routing["words"]:
        assert len(word["shares"]) == routing["blocks"]
        assert all(
            len(row) == len(routing["layers"]) and sum(row) == pytest.approx(1, abs=0.01) for row in word["shares"]
        )
    assert all(row[1] == 1 for row in routing["words"][2]["shares"])


def test_reports_of_one_picture_and_of_two(server: RunningServer) -> None:
    first, second = (
        server.ask("POST", GENERATIONS, {"prompt": f"a {what} dog", "steps": 2}).json["data"][0]["job"]
        for what in ("red", "green")
    )
    one = server.ask("GET", f"/v1/jobs/{first}/report")
    assert b"<!doctype html>" in one.body.lower()
    # A report is a page of its own, without access to this server.
    assert one.headers["content-security-policy"] == "sandbox allow-scripts"
    both = server.ask("GET", f"/v1/jobs/{first}/report?with={second}")
    assert len(both.body) > len(one.body)
    assert server.ask("GET", f"/v1/jobs/{first}/report?with=nothing").status == 404


def test_a_picture_without_trace_has_none(server: RunningServer) -> None:
    answer = server.ask("POST", GENERATIONS, {"prompt": "a dog", "steps": 1, "trace": "off"})
    job = answer.json["data"][0]["job"]
    assert server.ask("GET", f"/v1/jobs/{job}/picture").status == 200
    assert server.ask("GET", f"/v1/jobs/{job}/trace").status == 404
    assert server.ask("GET", f"/v1/jobs/{job}/routing").status == 400


def test_replays_are_exact(server: RunningServer) -> None:
    picture = generated(server)
    assert pictures(server.form(REPLAYS, ("image", picture)))[0][0] == picture
    changed = pictures(server.form(REPLAYS, ("image", picture), ("changes", "seed=8"), ("changes", "steps=1")))[0][2]
    assert (changed.recipe.seed, changed.recipe.steps) == (8, 1)


def test_replays_are_changed_as_by_the_command(server: RunningServer) -> None:
    answer = server.ask("POST", GENERATIONS, {"prompt": "a {red|green} (dog:1.5)", "seed": 1, "steps": 1})
    picture = pictures(answer)[0][0]
    recipe = pictures(answer)[0][2].recipe
    assert recipe.weights is not None
    assert recipe.prompt in ("a red dog", "a green dog")
    recipe = pictures(server.form(REPLAYS, ("image", picture), ("changes", "prompt=a (cat:0.5)")))[0][2].recipe
    assert (recipe.weighted_prompt, recipe.template) == ("a (cat:0.5)", None)
    edited = server.form(EDITS, ("image", picture), ("prompt", "a green dog"), ("seed", 1), ("steps", 1))
    file = pictures(edited)[0][0]
    changes = (("changes", "strength=0.5"), ("changes", "image_cfg=2"))
    edit = pictures(server.form(REPLAYS, ("image", file), *changes))[0][2].recipe.edit
    assert (edit.strength, edit.image_cfg) == (0.5, 2.0)


def test_a_chain_of_edits_is_replayed_from_its_last_picture(server: RunningServer) -> None:
    first = generated(server)
    edited = server.form(EDITS, ("image", first), ("prompt", "a green dog"), ("seed", 1), ("steps", 1))
    file = pictures(edited)[0][0]
    assert pictures(server.form(REPLAYS, ("image", file)))[0][0] == file
    foreign = server.form(EDITS, ("image", png(Image.new("RGB", (32, 32)))), ("prompt", "a dog"), ("steps", 1))
    answer = server.form(REPLAYS, ("image", pictures(foreign)[0][0]))
    assert (answer.status, "input" in answer.message) == (400, True)


def forged(picture: bytes, **recipe) -> bytes:
    """A picture with another recipe."""
    from PIL.PngImagePlugin import PngInfo

    with Image.open(BytesIO(picture)) as image:
        record = json.loads(image.info["mos"])
        record["recipe"] |= recipe
        info, file = PngInfo(), BytesIO()
        info.add_itxt("mos", json.dumps(record))
        image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def test_forged_recipes_are_refused(server: RunningServer) -> None:
    cases = [
        ({"width": 100_000, "height": 100_000}, "100000x100000"),
        ({"steps": 10**9}, "steps"),
        ({"model": "../../models/other"}, "editor"),
        ({"model": "https://example.org/model"}, "editor"),
        ({"loras": [{"name": "../../a", "sha256": "0" * 64}]}, "loras"),
        ({"quant": "nf4"}, "quant"),
        ({"precision": "fp16"}, "precision"),
        ({"seed": 2**70}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"routes": ["dog=9999999"]}, "dog"),
        ({"edit": {"sources": []}}, "edit"),
        ({"route_from": {"sha256": "0" * 64}}, "another run"),
    ]
    batch = {"size": 64, "place": 0, "tokens": [[4096, 4096]] * 64}
    cases.append(({"batch": batch}, "4096 tokens"))
    picture = generated(server, steps=1)
    for recipe, told in cases:
        answer = server.form(REPLAYS, ("image", forged(picture, **recipe)))
        assert answer.status in (400, 409)
        assert told in answer.message, (told, answer.message)


def test_changes_of_a_replay_that_are_not_made(server: RunningServer) -> None:
    picture = generated(server, steps=1)
    for change in ("model=tiny", "loras=a", "seed", "nothing=1"):
        assert server.form(REPLAYS, ("image", picture), ("changes", change)).status == 400


def test_a_stream_has_every_step_and_ends_with_the_picture(server: RunningServer) -> None:
    answer = server.ask("POST", GENERATIONS, {"prompt": "a dog", "seed": 1, "steps": 3, "n": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    kinds = [event["type"] for event in answer.events]
    assert kinds.count("step") == 6
    assert kinds[-1] == "image_generation.completed"
    done = [event for event in answer.events if event["type"] == "image_generation.completed"]
    assert [event["seed"] for event in done] == [1, 2]
    assert read_drawing(BytesIO(base64.b64decode(done[0]["b64_json"])))[1].recipe.seed == 1


def test_jobs_that_are_not_waited_for(server: RunningServer) -> None:
    answer = server.ask("POST", GENERATIONS, {"prompt": "a dog", "steps": 2, "wait": False})
    assert answer.status == 202
    (job,) = answer.json["jobs"]
    events = server.ask("GET", f"/v1/jobs/{job['id']}/events").events
    assert [event["type"] for event in events][-1] == "done"
    assert server.ask("GET", f"/v1/jobs/{job['id']}").json["status"] == "done"
    assert job["id"] in [one["id"] for one in server.ask("GET", "/v1/jobs").json["jobs"]]
    assert server.ask("GET", "/v1/jobs/none").status == 404


def test_requests_have_the_options_of_jobs() -> None:
    files = {"picture", "references", "mask", "output"}
    assert set(JobLine.model_fields) - files - {"count"} <= set(EditBody.model_fields)
