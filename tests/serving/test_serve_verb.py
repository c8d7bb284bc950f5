"""`loralab serve` as a process: it tells when it is ready, and finishes streams on SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_adapters import llama, tokenizer, write_adapter_folder

from loralab.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    llama().save_pretrained(folder / "tiny")
    tokenizer().save_pretrained(folder / "tiny")
    write_adapter_folder(folder / "adapters" / "red", seed=1)
    shutil.copytree(folder / "adapters" / "red", folder / "adapters" / "blue")
    return folder


@contextmanager
def serving(world: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, dict[str, Any]]]:
    command = [sys.executable, "-m", "loralab", "serve", "--base", str(world / "tiny")]
    command += [
        "--adapters",
        str(world / "adapters"),
        "--port",
        "0",
        "--dtype",
        "float32",
        "--json",
    ]
    environment = {**os.environ, "LORALAB_CACHE": str(world / "cache"), "LORALAB_KERNELS": "off"}
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_streams_finish(world: Path) -> None:
    with serving(world) as (process, facts):
        assert facts["ready"] and facts["base"] == "tiny"
        assert facts["models"] == ["tiny", "blue", "red"]
        body = {"model": "red", "prompt": "x", "max_tokens": 200, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        url = f"{facts['url']}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert first and last["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0


def test_an_open_bind_without_keys_ends_with_2(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["serve", "--base", str(world / "tiny"), "--host", "0.0.0.0"])
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2 and "--host 0.0.0.0 lets other machines in, and there are no keys" in said
    assert "loralab serve --add-key NAME" in said


def test_keys_are_made_and_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    assert main(["serve", "--add-key", "alice", "--keys", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("loralab-") and made["key"] not in file.read_text()
    assert main(["serve", "--add-key", "alice", "--keys", str(file)]) == 2
    assert "has a key 'alice' already" in " ".join(capsys.readouterr().err.split())


def test_a_port_in_use_is_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loralab.serving.http import listen

    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--base", str(world / "tiny"), "--port", port]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in " ".join(capsys.readouterr().err.split())
