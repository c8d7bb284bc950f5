"""Styles of one's own images through the verbs: train, resume, evaluate, generate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import SIDE, save_images

from loralab.cli import main
from loralab.config import load_config, parse_config
from loralab.errors import ConfigError, DataError, Interrupted, ModelError, RunError
from loralab.imaging.latent import (
    Drawing,
    LatentBase,
    class_images,
    draw,
    from_bytes,
    open_base,
)
from loralab.runs.folder import Run
from loralab.runs.images import generate_images
from loralab.runs.tables import run_lines
from loralab.runs.train import resume, train

WEIGHTS_FILE = "adapter_model.safetensors"
PROMPTS = ["a red field", "a green dog"]


def settings(base: Path, images: Path, **changes: Any) -> Any:
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": str(base), "task": "image"},
        "data": {"name": str(images)},
        "images": {
            "resolution": SIDE,
            "sampling_steps": 2,
            "guidance": 3.0,
            "validation_prompts": PROMPTS,
            "sample_steps": 4,
        },
        "method": {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "conv1"]},
        "training": {
            "learning_rate": 2e-2,
            "batch_size": 2,
            "epochs": 2,
            "checkpoint_steps": 2,
            "device": "cpu",
        },
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        tables[section][key] = value
    return parse_config(tables)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save_images(tmp_path / "images")
    return tmp_path / "images"


def same_adapter(one: Run, other: Run) -> bool:
    ours, theirs = (load_file(run.folder / "adapter" / WEIGHTS_FILE) for run in (one, other))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_verb_trains_draws_and_writes_what_diffusers_reads(
    tmp_path: Path,
    pipelines: dict[str, Path],
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings(pipelines["sd"], images).to_toml())
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--output", str(run), "--json"]) in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "finished" and told["steps_done"] == 6
    assert told["data"]["train"] == 6 and told["data"]["captions"] == 6

    samples = sorted(file.relative_to(run / "samples") for file in run.glob("samples/*/*.png"))
    assert [str(name) for name in samples] == ["step-00000004/00.png", "step-00000004/01.png"]
    with Image.open(run / "grid.png") as grid:
        assert grid.size[0] > 3 * SIDE and grid.size[1] > 2 * SIDE
    page = (run / "report.html").read_text()
    assert all(prompt in page for prompt in PROMPTS) and page.count("data:image/png;base64,") == 2
    lines = (run / "evaluation" / "images.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == PROMPTS and all(row["moved"] > 0 for row in rows)

    arguments = ["generate", str(run), PROMPTS[0], "--image", str(tmp_path / "a.png")]
    assert main([*arguments, "--seed", "0"]) in (0, None)
    ours = from_bytes((tmp_path / "a.png").read_bytes())
    pipe = StableDiffusionPipeline.from_pretrained(pipelines["sd"])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run / "adapter")  # by the name of the file alone
    theirs = pipe(
        PROMPTS[0],
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images[0]
    assert (ours - (theirs * 2 - 1)).abs().max() < 1.01 / 127.5  # a PNG has 256 greys

    merged = tmp_path / "merged"
    assert main(["merge", str(run / "adapter"), "--output", str(merged)]) in (0, None)
    base = open_base(str(merged), device=torch.device("cpu"))
    [[again]] = draw(base, base.unet(), PROMPTS[:1], Drawing(SIDE, 2, 3.0), routes=[None])
    assert (again - ours).abs().max() < 1.01 / 127.5
    assert (merged / "merge_certificate.json").is_file()

    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) in (0, None)
    assert json.loads(capsys.readouterr().out)["grid"] == "grid.png"


def test_a_resumed_run_is_the_same_and_needs_no_vae(
    tmp_path: Path, pipelines: dict[str, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(pipelines["xl"], images)
    whole = train(config, tmp_path / "whole")
    from loralab.runs.images import latent

    def interrupted(self: Any, folder: Path, step: int, listen: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latent.LatentStyle, "watch", interrupted)
        with pytest.raises(Interrupted, match="the state is saved in"):
            train(config, tmp_path / "parts")
    encodings: list[Any] = []
    with monkeypatch.context() as patch:
        vae = LatentBase.vae
        patch.setattr(LatentBase, "vae", lambda base: encodings.append(base) or vae(base))
        parts = resume(tmp_path / "parts")
    assert len(encodings) == 2  # the samples' and the judge's: no image was encoded again
    assert same_adapter(whole, parts)
    for name in ("metrics.jsonl", "grid.png"):
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()


def test_a_run_is_not_resumed_on_a_changed_image(
    tmp_path: Path, pipelines: dict[str, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.runs.images import latent

    def interrupted(self: Any, folder: Path, step: int, listen: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latent.LatentStyle, "watch", interrupted)
        with pytest.raises(Interrupted):
            train(settings(pipelines["sd"], images), tmp_path / "run")
    Image.new("RGB", (20, 20), "black").save(images / "2.png")
    with pytest.raises(RunError, match="the data have changed since the run was started"):
        resume(tmp_path / "run")


def test_class_images_come_along(tmp_path: Path, pipelines: dict[str, Path], images: Path) -> None:
    """Drawn by the base, or from a folder; without weight there are none."""
    prior = {"images__prior_prompt": "a field", "images__num_prior_images": 3}
    quick = {"images__validation_prompts": [], "images__sample_steps": None}
    few = {"data__train_rows": 2, "training__max_steps": 2}
    drawn = train(settings(pipelines["sd"], images, **prior, **quick, **few), tmp_path / "drawn")
    assert drawn.manifest["data"]["class_images"] == 3 and drawn.manifest["data"]["train"] == 2
    base = open_base(str(pipelines["sd"]), dtype=torch.float32, device=torch.device("cpu"))
    folder = class_images(base, base.unet(), "a field", 3, Drawing(SIDE, 2, 3.0))
    given = {**prior, "images__prior_folder": str(shutil.copytree(folder, tmp_path / "class"))}
    same = train(settings(pipelines["sd"], images, **given, **quick, **few), tmp_path / "given")
    assert same_adapter(drawn, same)
    none = {**prior, "images__prior_weight": 0.0}
    without = train(settings(pipelines["sd"], images, **none, **quick, **few), tmp_path / "none")
    plain = train(settings(pipelines["sd"], images, **quick, **few), tmp_path / "plain")
    assert "class_images" not in without.manifest["data"]
    assert same_adapter(without, plain) and not same_adapter(without, same)


def test_settings_that_cannot_be_followed_are_all_named(tmp_path: Path) -> None:
    changes = {
        "model__dtype": "float16",
        "data__train": "rows.csv",
        "images__judged_images": 3,
        "images__prior_folder": "class",
        "images__validation_prompts": [],
    }
    with pytest.raises(ConfigError) as raised:
        train(settings(tmp_path, tmp_path, **changes), tmp_path / "run")
    for said in (
        "images.judged_images is for styles of digits",
        "data.train is 'rows.csv'; give the folder as data.name",
        "model.dtype is 'float16', which has no loss scaling",
        "images.prior_folder needs images.prior_prompt",
        "images.sample_steps needs images.validation_prompts",
    ):
        assert said in raised.value.cause
    assert not (tmp_path / "run").exists()


def test_faults_are_found_before_a_run_begins(
    tmp_path: Path, pipelines: dict[str, Path], images: Path
) -> None:
    config = settings(pipelines["sd"], images, images__resolution=20)
    with pytest.raises(ModelError, match="20 x 20 pixels do not fit"):
        train(config, tmp_path / "run")
    (images / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="no image has a caption"):
        train(settings(pipelines["sd"], images), tmp_path / "run")
    (images / "3.png").write_bytes(b"no image")
    prompt = {"images__prompt": "sks field"}
    with pytest.raises(DataError, match=r"an image cannot be read: 3\.png"):
        train(settings(pipelines["sd"], images, **prompt), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    skipping = {**prompt, "images__skip_unreadable": True, "training__max_steps": 1}
    heard: list[Any] = []
    run = train(
        settings(pipelines["sd"], images, **skipping), tmp_path / "run", listen=heard.append
    )
    assert run.manifest["data"]["train"] == 5
    assert any("left out: 3.png" in getattr(event, "text", "") for event in heard)


def test_what_to_do_next_is_a_prompt_and_an_empty_one_is_refused(
    tmp_path: Path, pipelines: dict[str, Path], images: Path
) -> None:
    quick = {"images__validation_prompts": [], "images__sample_steps": None}
    config = settings(pipelines["sd"], images, training__max_steps=1, **quick)
    run = train(config, tmp_path / "run")
    assert run_lines(run).endswith(f'generate {run.folder} "a red field" --image out.png')
    with pytest.raises(DataError, match="the prompt is empty"):
        generate_images(run.folder, " ", tmp_path / "a.png")


def test_the_recipe_for_a_hub_and_a_gpu_is_one() -> None:
    config = load_config("stable-diffusion-style")
    assert config.model.task == "image" and config.images.resolution == 512
    assert config.method.targets == ["to_q", "to_k", "to_v", "to_out.0"]
