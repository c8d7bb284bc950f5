"""Every command and every line of Python in the README works.

The fast test runs them with fewer rows and steps, and compares two methods; the slow one, and
`make demo`, as they stand.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from loralab.cli import main
from loralab.imaging import BaseRecipe
from loralab.runs.images import digits

pytestmark = pytest.mark.xdist_group("tour")  # groups start first, and the tour is the longest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
SMALL = {
    "train": [
        *("data.train_rows=48", "data.validation_rows=32", "data.test_rows=32"),
        "training.epochs=1",
    ],
    "compare": [
        *("data.train_rows=16", "data.validation_rows=16", "data.test_rows=16"),
        *("training.epochs=1", "training.batch_size=8"),
        'compare.methods=["lora", "full"]',
        *(f"compare.learning_rates.{method}=[1e-3]" for method in ("lora", "full")),
        *("compare.max_extensions=0", "compare.measured_steps=1"),
    ],
}
STYLES = ["training.max_steps=2", "images.judged_images=0", "images.sampling_steps=2"]


def test_the_readme_has_the_commands_this_test_runs():
    assert [command for command in COMMANDS if command.startswith("make")] == [
        "make demo",
        "make test",
    ]
    assert {command.split()[1] for command in COMMANDS if command.startswith("loralab")} >= {
        "fetch",
        "init",
        "plan",
        "doctor",
        "train",
        "evaluate",
        "generate",
        "compare",
    }


@pytest.fixture
def tiny_digits_base(tmp_path, monkeypatch):
    """The base that draws digits, made in a second instead of minutes, outside of the cache."""
    tiny = BaseRecipe(channels=(16, 16), num_steps=2, batch_size=4)
    monkeypatch.setattr(digits, "BaseRecipe", lambda: tiny)
    monkeypatch.setattr(type(tiny), "folder", lambda _: tmp_path / "digits-diffusion")


@pytest.mark.usefixtures("tiny_digits_base")
def test_the_tour_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if arguments[0] == "serve":
            serves([*arguments[:-1], "0"])
        elif program == "loralab":
            smaller = STYLES if "digits-styles" in arguments else SMALL.get(arguments[0], [])
            assert main([*arguments, *smaller]) == 0, (command, capsys.readouterr().err)


def serves(arguments: list[str]) -> None:
    """The server answers about the run's adapter, and ends in good order."""
    command = [sys.executable, "-m", "loralab", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        with urllib.request.urlopen(f"{ready['url']}/v1/models", timeout=60) as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert len(names) == 2  # the base and the run's adapter


def test_the_python_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})  # the README is ours
    assert (tmp_path / "reviews-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_tour_works_as_it_stands(tmp_path):
    for command in COMMANDS:
        if command.startswith("loralab serve"):
            continue  # never ends
        if command.startswith("loralab"):
            program = [sys.executable, "-m", *shlex.split(command)]
            subprocess.run(program, cwd=tmp_path, check=True, timeout=3600)


@pytest.mark.slow
def test_the_demo_works_and_again_in_seconds(tmp_path):
    command = [sys.executable, "-m", "loralab", "compare", "demo", "--output", "runs/demo"]
    first = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=3600
    )
    assert "runs/demo/comparison.json" in first.stdout
    assert "runs/demo/report.html" in first.stdout
    again = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=15
    )
    assert again.stdout == first.stdout
