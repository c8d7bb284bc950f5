"""What docs/images.md shows works: its Python as it stands, but for fewer steps."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "images.md"


def test_the_python_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    shorter = re.sub(r"epochs=\d+", "max_steps=1", block)
    assert shorter.count("max_steps=1") == 2
    names = {"folder": tmp_path}
    exec(compile(shorter, str(DOCS), "exec"), names)  # the docs are ours
    assert (tmp_path / "digits-diffusion" / "model_index.json").is_file()
    assert (tmp_path / "chalk-adapter" / "adapter_model.safetensors").is_file()
    assert names["images"].shape == (3, 1, 32, 32)
