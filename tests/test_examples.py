"""The examples keep what they print: LoRA learns on any module and comes back from its file."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_learns_and_loads_what_it_learnt(name, capsys):
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) < 60
    found = runpy.run_path(str(file))
    assert found["after"] > max(0.75, found["before"] + 0.1)
    assert found["difference"] < 1e-5
    assert found["num_bytes"] < 100_000
    assert f"after {found['after']:.3f}" in capsys.readouterr().out
