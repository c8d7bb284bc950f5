"""The base that is trained here: once, whole or not at all, under a name that says what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.catalogue import find_entry
from loralab.errors import ConfigError, FetchError, Interrupted, ModelError
from loralab.events import Note, Phase
from loralab.imaging import BaseRecipe, base as base_module, digits_base, load_denoiser
from loralab.models import model_folder
from loralab.runs.fetch import catalogue, fetch_entries
from loralab.runs.init import write_recipe

TINY = BaseRecipe(channels=(16, 16), num_steps=3, batch_size=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    folder = digits_base(TINY, device="cpu", threads=1, listen=told.append)
    assert folder == TINY.folder() and load_denoiser(folder).image_size == 32
    assert any(isinstance(event, Phase) and "once" in event.title for event in told)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    monkeypatch.setattr(base_module, "_train", lambda *_: pytest.fail("trained again"))
    assert digits_base(TINY, device="cpu", threads=1) == folder


def test_training_changed_it() -> None:
    trained = load_denoiser(digits_base(TINY, device="cpu", threads=1)).unet
    fresh = TINY.build().unet.state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in trained.state_dict().items())


def test_an_interrupted_training_goes_on_to_the_same_base(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_denoiser(digits_base(TINY, device="cpu", threads=1)).unet.state_dict()
    for file in sorted(cache.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    fit = base_module.fit

    def cut(*args: Any) -> Any:
        for event in fit(*args):
            yield event
            if getattr(event, "step", 0) == 2:
                raise Interrupted("stopped", "go on")

    monkeypatch.setattr(base_module, "fit", cut)
    with pytest.raises(Interrupted, match="state is safe in the cache") as caught:
        digits_base(TINY, device="cpu", threads=1)
    assert "the same command again" in caught.value.next_step
    assert not TINY.folder().exists()
    monkeypatch.undo()
    monkeypatch.setenv("LORALAB_CACHE", str(cache))
    again = load_denoiser(digits_base(TINY, device="cpu", threads=1)).unet.state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_checkpoint_that_does_not_fit_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    real = base_module._trained
    calls: list[Path] = []

    def refuses_once(recipe: BaseRecipe, work: Path, *rest: Any) -> Any:
        work.mkdir(parents=True, exist_ok=True)
        calls.append(work)
        if len(calls) == 1:
            raise base_module.ResumeError("threads was 2, is 1", "resume it there")
        return real(recipe, work, *rest)

    monkeypatch.setattr(base_module, "_trained", refuses_once)
    digits_base(TINY, device="cpu", threads=1, listen=told.append)
    notes = [event.text for event in told if isinstance(event, Note)]
    assert any("starts again: threads was 2" in text for text in notes)


def test_recipe_and_versions_decide_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {TINY.key(), BaseRecipe().key(), BaseRecipe(seed=1).key()}
    assert len(keys) == 3
    monkeypatch.setattr(base_module, "version", lambda _name: "0.0")
    assert TINY.key() not in keys


def test_fetch_lists_it_and_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(entry for entry in catalogue() if entry["name"] == "digits-diffusion")
    assert (entry["kind"], entry["size"]) == ("model", "trained here")
    monkeypatch.setattr(base_module, "BaseRecipe", lambda: TINY)
    assert fetch_entries(["digits-diffusion"]) == {"digits-diffusion": str(TINY.folder())}
    with pytest.raises(FetchError, match="did you mean 'digits-diffusion'"):
        find_entry("digits-difusion")


def test_as_a_language_model_it_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'digits-diffusion' is an image model") as caught:
        model_folder("digits-diffusion")
    assert "model.task to 'image'" in caught.value.next_step


def test_init_writes_the_shipped_recipe(tmp_path: Path) -> None:
    from loralab.config import load_config

    write_recipe(tmp_path / "r.toml", model="digits-diffusion", data="movie-reviews")
    assert load_config(tmp_path / "r.toml") == load_config("digits-styles")
    with pytest.raises(ConfigError, match="for language models"):
        load_config(tmp_path / "r.toml").model.check_reads_text()
