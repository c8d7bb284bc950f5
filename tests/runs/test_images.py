"""Images from the command line: each along its own route, in one batch."""

import json
from pathlib import Path

import pytest
import torch

from loralab.adapters import LoRAConfig, attach, save_adapter
from loralab.cli import main
from loralab.errors import DataError, ModelError
from loralab.runs.images import Wanted, generate_images, parse_prompt

pytest.importorskip("diffusers")
KNOWN = ["bold", "chalk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained denoiser and two adapters with an effect."""
    from loralab.imaging import build_denoiser, save_denoiser

    folder = tmp_path_factory.mktemp("styles")
    denoiser = build_denoiser(channels=(16, 16), fold=4, image_size=16)
    save_denoiser(denoiser, folder / "base")
    for seed, name in enumerate(KNOWN):
        attach(denoiser.unet, LoRAConfig(rank=2, targets=["to_q", "conv1"]), name, seed=seed)
        for parameter, value in denoiser.unet.named_parameters():
            if parameter.endswith(f"adapters.{name}.B"):
                torch.nn.init.normal_(value, std=0.5)
        save_adapter(denoiser.unet, name, folder / name)
    return folder


def test_a_prompt_names_classes_adapters_and_weights() -> None:
    assert parse_prompt("3:bold 0 9:bold=0.25,chalk=.75", KNOWN, num_classes=10) == [
        Wanted(3, {"bold": 1.0}),
        Wanted(0, {}),
        Wanted(9, {"bold": 0.25, "chalk": 0.75}),
    ]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty"),
        ("12", "'12' is no class from 0 to 9"),
        ("3:bald", "no adapter 'bald'; did you mean 'bold'"),
        ("3:bold=much", "'much' is no weight"),
        ("3:bold,bold", "'bold' stands twice"),
    ],
)
def test_what_a_prompt_gets_wrong_is_named(prompt: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_prompt(prompt, KNOWN, num_classes=10)
    assert "CLASS:ADAPTER" in caught.value.next_step


def test_all_faults_of_a_prompt_are_told_at_once() -> None:
    with pytest.raises(DataError, match=r"'x'.*'bald'"):
        parse_prompt("x 3:bald", KNOWN, num_classes=10)


def test_the_command_draws_a_png_that_its_seed_decides(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "3:bold 3:chalk 3 3:bold=0.5,chalk=0.5"
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, seed in zip(files, ("5", "5", "6"), strict=True):
        arguments = ["generate", str(folder), prompt, "--image", str(file), "--seed", seed]
        assert main([*arguments, "--json"]) in (0, None)
        told = json.loads(capsys.readouterr().out)
        assert [each["label"] for each in told["images"]] == [3] * 4
    contents = [file.read_bytes() for file in files]
    assert contents[0].startswith(b"\x89PNG")
    assert contents[0] == contents[1] != contents[2]


def test_a_folder_without_a_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no base/"):
        generate_images(tmp_path, "3", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
