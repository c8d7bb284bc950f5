"""Styles of digits through the verbs: trained in one pass, resumed, drawn with, judged, refused."""

import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_styles import recipe, tiny_base

from loralab.adapters import load_adapter, read_adapter
from loralab.cli import main
from loralab.config import load_config, parse_config
from loralab.errors import (
    AdapterError,
    ConfigError,
    DataError,
    LoralabError,
    ModelError,
    ResumeError,
    RunError,
    TargetError,
)
from loralab.imaging import load_denoiser, sample_images, train_judges
from loralab.runs.compare import compare
from loralab.runs.doctor import examine
from loralab.runs.evaluate import evaluate
from loralab.runs.folder import Run, open_run
from loralab.runs.generate import generate
from loralab.runs.images import (
    Judgement,
    digits as digits_module,
    generate_images,
    judging,
    training,
)
from loralab.runs.inspect import inspect
from loralab.runs.lint import lint_sources
from loralab.runs.merge import merge
from loralab.runs.plan import plan
from loralab.runs.rank import rank
from loralab.runs.train import resume, train

pytestmark = pytest.mark.xdist_group("styles")  # one worker makes what its tests share

WEIGHTS = "adapter_model.safetensors"
NAMES = ["bold", "chalk"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe(base), tmp_path_factory.mktemp("runs") / "styles")


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing: what is tested comes before."""
    document = {"task": "image", "split": "images", "rows": 0, "metrics": {}}
    monkeypatch.setattr(digits_module, "judge_styles", lambda *_: Judgement(document))


def test_a_run_folder_describes_itself(run: Run, base: Path) -> None:
    assert run.finished and open_run(run.folder).config == run.config
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        *("config.toml", "manifest.json", "metrics.jsonl", "timing.jsonl", "evaluation"),
        *("report.html", "grid.png", *NAMES),
    }
    manifest = run.manifest
    assert list(manifest["adapters"]) == NAMES
    assert manifest["base"] == {"folder": str(base)}
    assert manifest["steps_done"] == 6 and manifest["data"]["train"] == 60
    rows = run.rows_of("metrics.jsonl")
    assert [(row["step"], row["adapter"]) for row in rows] == [
        (step, name) for step in range(1, 7) for name in NAMES
    ]
    for name in NAMES:
        adapter = read_adapter(run.folder / name)
        numbers = sum(A.numel() + B.numel() for A, B in adapter.pairs.values())
        assert numbers == manifest["adapters"][name]["trainable_parameters"]


def test_its_report_is_one_file_with_the_images_in_it(run: Run) -> None:
    page = (run.folder / "report.html").read_text("utf-8")
    strips = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="0, 1, [^"]+"', page)
    assert len(strips) == 1 + 2 * 4 + 5  # the base, four weights of each style, a mix of both
    assert "bold" in page and "weight 0.25" in page
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    sources = re.findall(r'<(?:img|link|script|iframe)\b[^>]*\b(?:src|href)="([^"]*)"', body)
    assert sources and all(source.startswith("data:") for source in sources)


def test_images_go_along_their_routes_without_a_copy_of_the_base(
    run: Run, base: Path, tmp_path: Path
) -> None:
    told = generate_images(run.folder, "3:bold 3:chalk=0.5 3", tmp_path / "out.png", seed=4)
    assert [image["route"] for image in told["images"]] == [{"bold": 1.0}, {"chalk": 0.5}, {}]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not (run.folder / "base").exists()
    denoiser = load_denoiser(base)
    load_adapter(denoiser.unet, run.folder / "bold", "bold")
    ours = sample_images(denoiser, [3, 3], seeds=[4, 4], routes=["bold", None], num_steps=2)
    assert (ours[0] - ours[1]).abs().max() > 0  # the adapter does something


def test_a_base_in_the_runs_folder_comes_first(run: Run, base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run.folder, tmp_path / "moved")
    tiny_base(moved / "base", seed=1)
    with pytest.raises(AdapterError, match=r"another base: of \d+ parameters .*first: conv_in"):
        generate_images(moved, "3:bold", tmp_path / "out.png")
    shutil.rmtree(moved / "base")
    shutil.copytree(base, moved / "base")
    assert generate_images(moved, "3:bold", tmp_path / "out.png")["images"][0]["label"] == 3


@pytest.mark.usefixtures("unjudged")
@pytest.mark.parametrize("at", [6, 14])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    at: int, run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any event: nothing is told to the run, nothing more is saved."""
    whole = training.fit_many

    def cut(*args: Any, **more: Any) -> Any:
        for count, event in enumerate(whole(*args, **more)):
            if count == at:
                raise SystemExit
            yield event

    monkeypatch.setattr(training, "fit_many", cut)
    with pytest.raises(SystemExit):
        train(recipe(base), tmp_path / "cut")
    monkeypatch.undo()
    killed = open_run(tmp_path / "cut")
    assert not killed.finished
    with pytest.raises(RunError, match="not finished"):
        generate_images(killed.folder, "3:bold", tmp_path / "out.png")
    again = resume(tmp_path / "cut")
    for name in NAMES:
        ours, theirs = (each.folder / name / WEIGHTS for each in (again, run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert again.rows_of("metrics.jsonl") == run.rows_of("metrics.jsonl")


def test_a_run_does_not_go_on_over_another_base(base: Path, tmp_path: Path, monkeypatch) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    whole = training.fit_many
    events: list[Any] = []

    def two_saved(*args: Any, **more: Any) -> Any:
        for event in whole(*args, **more):
            events.append(event)
            yield event
            if len(events) > 12:
                raise SystemExit

    monkeypatch.setattr(training, "fit_many", two_saved)
    with pytest.raises(SystemExit):
        train(recipe(copied), tmp_path / "run")
    monkeypatch.undo()
    tiny_base(copied, seed=1)
    with pytest.raises(ResumeError, match=r"parameters\.frozen was"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ('images.styles=["bald"]', ConfigError, r"unknown style 'bald'; did you mean 'bold'"),
        ("images.styles=[]", ConfigError, "images.styles is empty; known: bold, outline, chalk"),
        ('images.styles=["bold", "bold"]', ConfigError, "names a style twice"),
        ("data.name=digit", ConfigError, "data.name is 'digit'; this base learns styles of"),
        ("method.kind=full", ConfigError, "of image models only adapters are trained"),
        ('method.targets=["to_x"]', TargetError, "target 'to_x'.*nearest is 'to_"),
        ("training.patience=3", ConfigError, "training.patience: a language model's"),
        ("model.pooling=mean", ConfigError, "model.pooling: a language model's"),
        ("model.dtype=float16", ConfigError, "digits train in float32 or bfloat16"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named_before_a_base_is_trained(
    override: str,
    error: type[LoralabError],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_args: Any, **_more: Any) -> Path:
        raise AssertionError("minutes were spent")

    monkeypatch.setattr(digits_module, "digits_base", never)
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(error, match=said):
        train(recipe("digits-diffusion", override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_images_mean_nothing_to_text() -> None:
    with pytest.raises(ConfigError, match=r"images\.guidance: an image model's"):
        load_config("demo", ["images.guidance=3.0"])


@pytest.mark.parametrize("package", ["diffusers", "sklearn.datasets", "PIL"])
def test_what_is_not_installed_is_named(
    package: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match="not installed") as caught:
        train(recipe(base), tmp_path / "run")
    assert "pip install 'loralab[images]'" in caught.value.next_step
    assert not (tmp_path / "run").exists()


def test_inspect_and_merge_take_one_adapter(run: Run, base: Path, tmp_path: Path) -> None:
    found = inspect(run.folder / "bold", base=str(base / "unet"))
    assert found["kind"] == "adapter" and found["base"].endswith("unet")
    certificate = merge(run.folder / "bold", tmp_path / "merged")
    assert certificate["relative_error"] < 1e-5
    assert (tmp_path / "merged" / "merge_certificate.json").is_file()
    separate = load_denoiser(base)
    load_adapter(separate.unet, run.folder / "bold", "bold")
    ours, theirs = (
        sample_images(each, [1, 2], seeds=[0, 1], routes=route, num_steps=2)
        for each, route in (
            (load_denoiser(tmp_path / "merged"), None),
            (separate, ["bold", "bold"]),
        )
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert generate_images(tmp_path / "merged", "1 2", tmp_path / "two.png")["images"]


def test_the_doctor_looks_at_every_adapter(base: Path) -> None:
    messages = [finding["message"] for finding in examine(recipe(base))]
    assert "a gradient reached every trained tensor" in messages
    assert sum(message.startswith("chalk: step") for message in messages) == 2
    assert sum("parameters train" in message for message in messages) == 1


def test_judges_see_what_is_drawn(run: Run, tmp_path: Path, monkeypatch) -> None:
    """An untrained base draws noise, so figures are low; what counts is that they are all there."""
    copied = shutil.copytree(run.folder, tmp_path / "judged")
    text = (copied / "config.toml").read_text().replace("judged_images = 0", "judged_images = 10")
    (copied / "config.toml").write_text(text)
    quick = functools.partial(train_judges, epochs=1)
    monkeypatch.setattr(judging, "train_judges", lambda held_out: quick(held_out[:60]))
    found = evaluate(copied)
    assert found["rows"] == 30 and set(found["looks"]) == {"plain", *NAMES}
    assert set(found["metrics"]) == {"style_accuracy", "digit_accuracy", "base_is_no_style"}
    for figure in (*found["metrics"].values(), found["looks"]["bold"]["frechet_distance"]):
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert [(mix["start"], mix["end"]) for mix in found["mixes"]] == [
        *(("plain", name) for name in NAMES),
        ("bold", "chalk"),
    ]
    assert all(0 <= share <= 1 for mix in found["mixes"] for share in mix["end_share"])
    assert max(found["merged"].values()) < 1e-3
    rows = Run(copied, run.config, run.manifest).predictions("images")
    assert len(rows) == 30 and rows[13]["id"] == "bold/0003" and rows[13]["digit"] == 3
    seen = sum(row["seen_look"] == "plain" for row in rows[:10])
    assert found["looks"]["plain"]["style_accuracy"]["mean"] == seen / 10


def test_other_verbs_say_what_takes_the_run(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = run.config
    for refused in (
        lambda: generate(run.folder, "a prompt"),
        lambda: inspect(run.folder),
        lambda: merge(run.folder, out),
        lambda: rank(run.folder),
    ):
        with pytest.raises(RunError, match="image model, with adapters bold, chalk") as caught:
            refused()
        assert str(run.folder / "bold") in caught.value.next_step
    assert main(["serve", str(run.folder)]) == 2
    for refused in (
        lambda: compare(config, out),
        lambda: plan(config),
        lambda: lint_sources([str(run.folder)]),
    ):
        with pytest.raises(ConfigError, match=r"is an image model.*for language models"):
            refused()
    with pytest.raises(ConfigError, match="adapter of an image model"):
        rank(run.folder / "bold", data="tweets", base="minilm")
    with pytest.raises(ConfigError, match="judged on images that it draws"):
        evaluate(run.folder, data="tweets")
    with pytest.raises(DataError, match=r"'12' is no class.*no adapter 'bald'; did you mean"):
        generate_images(run.folder, "12 3:bald", out)
    assert not out.exists()


@pytest.mark.usefixtures("unjudged")
def test_the_command_line_trains_and_draws(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(base, "training.max_steps=2")
    (tmp_path / "r.toml").write_text(config.to_toml())
    assert parse_config(config.tables()) == config
    folder = tmp_path / "styles"
    assert main(["train", str(tmp_path / "r.toml"), "--output", str(folder)]) in (0, None)
    told = capsys.readouterr()
    assert "2 adapters in one pass: bold, chalk" in told.err
    assert f'Next: loralab generate {folder} "3:bold 3:chalk 3" --image out.png' in told.out
    drawn = ["generate", str(folder), "3:bold 3", "--image", str(tmp_path / "x.png"), "--json"]
    assert main(drawn) in (0, None)
    assert len(json.loads(capsys.readouterr().out)["images"]) == 2


def test_adapters_of_a_run_are_peft_files(run: Run, base: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load_denoiser(base).unet, run.folder / "bold").eval()
    ours = load_denoiser(base).unet.eval()
    load_adapter(ours, run.folder / "bold", "bold")
    x, t, y = torch.randn(2, 16, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    from loralab.adapters import use

    with torch.no_grad(), use(ours, "bold"):
        mine = ours(x, t, class_labels=y).sample
    with torch.no_grad():
        torch.testing.assert_close(mine, theirs(x, t, class_labels=y).sample, atol=1e-5, rtol=1e-5)
    assert load_file(run.folder / "bold" / WEIGHTS)
