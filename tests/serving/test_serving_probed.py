"""`export`, `serve` and `probe` together: what is exported is found applied where it is served."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served_adapters import llama, tokenizer, write_adapter_folder
from served_http import Server, serving

from loralab.runs.export import export
from loralab.runs.probe import probe
from loralab.serving.http import create_app

pytestmark = pytest.mark.xdist_group("probed")  # one worker makes what its tests share


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter "red" and another, and the export of "red" for vLLM."""
    folder = tmp_path_factory.mktemp("probed")
    llama().save_pretrained(folder / "tiny")
    tokenizer().save_pretrained(folder / "tiny")
    red = write_adapter_folder(folder / "adapters" / "red", seed=1, scaling="alpha/sqrt(rank)")
    write_adapter_folder(folder / "adapters" / "blue", seed=2)
    export(red, folder / "exported", engine="vllm", base=str(folder / "tiny"), name="red")
    shutil.copytree(folder / "exported" / "adapter", folder / "adapters" / "canonical")
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Server]:
    with serving(world / "adapters", num_slots=3) as made:
        yield made


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        ("red", "applied"),
        ("canonical", "applied"),
        ("red=0.5", "wrong scale"),
        ("tiny", "not applied"),
        ("blue", "something else"),
    ],
)
def test_the_probe_tells_what_the_server_applies(
    world: Path, server: Server, model: str, verdict: str
) -> None:
    found = probe(server.url, world / "exported", model=model)
    assert found["verdict"] == verdict, found
    assert "(echo)" in found["checked"]


def test_routes_are_made_before_requests_come(server: Server, monkeypatch) -> None:
    def made(**_: object) -> None:
        raise AssertionError("a request waits for it")

    app = create_app(server.service)
    monkeypatch.setattr("fastapi.routing.get_dependant", made)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").status_code == 200


def test_the_server_tells_the_probe_its_base(world: Path, server: Server) -> None:
    found = probe(server.url, world / "exported")
    assert found["verdict"] == "applied" and found["base_nats"] == pytest.approx(0, abs=1e-3)
