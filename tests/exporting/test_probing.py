"""A probe tells what a server does with an adapter: five verdicts, by whatever it can answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer
from tiny_decoder import save_decoder

import loralab
from loralab.adapters import adapter_parameters
from loralab.errors import ConfigError, ServerError
from loralab.exporting import TEXTS, make_server_probes, read_probe_file, write_probe_file
from loralab.models import load_tokenizer
from loralab.runs.probe import probe

CAN = {
    "echo": ("echo", "logprobs", "ids"),
    "prompt_logprobs": ("prompt_logprobs", "ids"),
    "logprobs": ("logprobs", "ids"),
    "logprobs, texts only": ("logprobs",),
    "texts": (),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("small") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def host(small: Path, make_adapter: Any) -> Any:
    """A model that hosts the adapter "a" of rank 4, trained as rsLoRA with alpha 8."""
    return make_adapter(small, scaling="alpha/sqrt(rank)", size=0.08)[0]


@pytest.fixture(scope="module")
def words(small: Path) -> Any:
    return load_tokenizer(str(small))


@pytest.fixture(scope="module")
def file(host: Any, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "probes.json"
    original = {"rank": 4, "alpha": 8, "scaling": "alpha/sqrt(rank)"}
    probes = make_server_probes(
        host, "a", words, TEXTS[:3], served_name="reviews", original=original
    )
    write_probe_file(probes, path)
    return path


@pytest.fixture(scope="module")
def says(host: Any) -> Callable[..., Callable[[list[int]], torch.Tensor]]:
    """What a model says with the adapter at a factor, without some modules, and with noise."""
    ups = {n: p for n, p in adapter_parameters(host, "a").items() if n.endswith(".B")}

    def variant(
        factor: float = 1.0, without: str = "nothing", noise: float = 0.0
    ) -> Callable[[list[int]], torch.Tensor]:
        generator = torch.Generator().manual_seed(7)

        def chances(ids: list[int]) -> torch.Tensor:
            kept = {name: up.detach().clone() for name, up in ups.items()}
            with torch.no_grad(), loralab.use(host, "a"):
                for name, up in ups.items():
                    up.mul_(0.0 if f".{without}." in name else factor)
                logits = host(torch.tensor([ids])).logits[0]
                for name, up in ups.items():
                    up.copy_(kept[name])
            logits = logits + noise * torch.randn(logits.shape, generator=generator)
            return logits.log_softmax(-1)

        return chances

    return variant


class TestVerdicts:
    @pytest.mark.parametrize("can", CAN)
    @pytest.mark.parametrize(("factor", "verdict"), [(1.0, "applied"), (0.0, "not applied")])
    def test_applied_or_not_is_seen_through_any_server(
        self, can: str, factor: float, verdict: str, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(models={"reviews": says(factor)}, tokenizer=words, can=CAN[can])
        found = probe(server.url, file)
        assert found["verdict"] == verdict
        expected = {"echo": "(echo)", "prompt_logprobs": "(prompt_logprobs)", "texts": "greedy"}
        assert expected.get(can, "(logprobs)") in found["checked"]

    @pytest.mark.parametrize(
        ("can", "factor"), [("echo", 0.4), ("echo", 1.5), ("logprobs", 0.25), ("logprobs", 2.0)]
    )
    def test_a_wrong_scale_is_measured(
        self, can: str, factor: float, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(models={"reviews": says(factor)}, tokenizer=words, can=CAN[can])
        found = probe(server.url, file)
        assert found["verdict"] == "wrong scale"
        assert found["factor"] == pytest.approx(factor, rel=0.15)

    def test_the_cause_of_a_wrong_scale_is_named(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        # an engine that reads rsLoRA of rank 4 as alpha / rank is at half the scale
        server = serve(models={"reviews": says(0.5)}, tokenizer=words)
        assert "as if rsLoRA is read as alpha / rank" in probe(server.url, file)["explanation"]

    @pytest.mark.parametrize("part", ["q_proj", "mlp"])
    def test_a_part_is_named(
        self, part: str, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(models={"reviews": says(without=part)}, tokenizer=words)
        found = probe(server.url, file)
        assert found["verdict"] == "something else"
        assert f"those without {part}" in found["explanation"]

    def test_another_base_is_something_else(
        self, serve: Any, words: Any, file: Path, tmp_path: Path
    ) -> None:
        base = save_decoder(tmp_path / "other", initializer_range=0.25)
        other = loralab.load_model(str(base), task="causal").eval()

        def chances(ids: list[int]) -> torch.Tensor:
            return other(torch.tensor([ids])).logits[0].log_softmax(-1)

        server = serve(models={"reviews": chances}, tokenizer=words)
        found = probe(server.url, file)
        assert found["verdict"] == "something else"
        assert "another base" in found["explanation"]

    def test_the_rounding_of_a_16_bit_server_is_no_other_verdict(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(models={"reviews": says(noise=0.03)}, tokenizer=words)
        assert probe(server.url, file)["verdict"] == "applied"

    def test_noise_as_large_as_the_effect_decides_nothing(
        self, serve: Any, says: Any, words: Any, small: Path, make_adapter: Any, tmp_path: Path
    ) -> None:
        weak, _ = make_adapter(small, size=0.002, targets=["q_proj"])
        probes = make_server_probes(weak, "a", words, TEXTS[:2], served_name="reviews")
        assert probes.effect < 0.01
        write_probe_file(probes, tmp_path / "p.json")
        server = serve(models={"reviews": says(0.0, noise=0.03)}, tokenizer=words)
        found = probe(server.url, tmp_path / "p.json")
        assert found["verdict"] == "undecided"
        assert "too near to the adapter's effect" in found["explanation"]

    def test_a_quantised_base_is_cancelled_by_asking_it_too(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        def bent(factor: float) -> Any:
            exact = says(factor)
            tilt = 0.3 * torch.randn(len(words), generator=torch.Generator().manual_seed(2))
            return lambda ids: (exact(ids) + tilt).log_softmax(-1)

        models = {"base": bent(0.0), "reviews": bent(1.0), "half": bent(0.5), "none": bent(0.0)}
        parents = dict.fromkeys(("reviews", "half", "none"), "base")
        server = serve(models=models, tokenizer=words, parents=parents)
        found = probe(server.url, file)
        assert found["verdict"] == "applied"
        assert found["base_model"] == "base"
        assert 0.1 < found["base_nats"] < 1
        assert probe(server.url, file, model="half")["verdict"] == "wrong scale"
        assert probe(server.url, file, model="none")["verdict"] == "not applied"

    def test_nothing_there(self, file: Path) -> None:
        closed = FakeServer()
        closed.close()
        found = probe(closed.url, file)
        assert found["verdict"] == "unreachable"
        assert "refused" in found["explanation"]

    def test_chat_shaped_log_likelihoods_are_read(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(
            models={"reviews": says()}, tokenizer=words, can=("logprobs", "ids"), shape="chat"
        )
        assert probe(server.url, file)["verdict"] == "applied"


class TestWhichModel:
    def test_the_exported_name_or_the_only_one_is_asked(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        server = serve(models={"reviews": says(), "other": says(0.0)}, tokenizer=words)
        assert probe(server.url + "/v1/", file)["model"] == "reviews"
        server = serve(models={"whatever": says()}, tokenizer=words)
        assert probe(server.url, file)["model"] == "whatever"

    def test_an_unknown_name_gets_the_nearest(self, serve: Any, says: Any, file: Path) -> None:
        server = serve(models={"first": says(), "second": says()})
        with pytest.raises(ServerError, match=r"no model 'secnd'\n.*'second'"):
            probe(server.url, file, model="secnd")
        with pytest.raises(
            ServerError, match=r"first, second; 'reviews' is none of them\n.*--model"
        ):
            probe(server.url, file)

    def test_sglangs_way_of_asking_is_told(
        self, serve: Any, says: Any, words: Any, file: Path
    ) -> None:
        models = {"reviews": says(0.0), "base:reviews": says()}
        server = serve(models=models, tokenizer=words, owner="sglang")
        assert "--model base:reviews" in probe(server.url, file)["explanation"]
        assert probe(server.url, file, model="base:reviews")["verdict"] == "applied"


class TestBadServers:
    def test_a_web_page(self, serve: Any, file: Path) -> None:
        page = b"<!doctype html><html><title>Welcome</title></html>"
        server = serve(raw=(200, "text/html", page))
        with pytest.raises(ServerError, match=r"no OpenAI-compatible.*a web page \('Welcome'\)"):
            probe(server.url, file)

    def test_a_redirect_is_not_followed(self, serve: Any, file: Path) -> None:
        server = serve(raw=(302, "text/plain", b""))
        with pytest.raises(ServerError, match=r"redirects to http://elsewhere.invalid/"):
            probe(server.url, file)

    @pytest.mark.parametrize(
        "told", [b"[]", b"null", b'{"data": 3}', b'{"choices": [{"logprobs": {"content": [1]}}]}']
    )
    def test_json_that_says_nothing(self, told: bytes, serve: Any, file: Path) -> None:
        server = serve(raw=(200, "application/json", told))
        with pytest.raises(ServerError):
            probe(server.url, file, model="reviews")

    def test_a_key_is_read_from_the_environment_and_never_shown(
        self, serve: Any, says: Any, words: Any, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve(models={"reviews": says()}, tokenizer=words, key="secret-word")
        with pytest.raises(ServerError, match=r"refuses the request \(401\)\n.*--key"):
            probe(server.url, file)
        monkeypatch.setenv("PROBE_KEY", "secret-word")
        found = probe(server.url, file, key_variable="PROBE_KEY")
        assert found["verdict"] == "applied"
        assert "secret-word" not in json.dumps(found)
        with pytest.raises(ConfigError, match="NOT_SET holds no key"):
            probe(server.url, file, key_variable="NOT_SET")

    @pytest.mark.parametrize(
        "url", ["file:///etc/passwd", "ftp://x/y", "localhost:8000", "http://", "", "http://a:b"]
    )
    def test_only_http_addresses(self, url: str, file: Path) -> None:
        with pytest.raises(ConfigError, match="address"):
            probe(url, file)

    def test_a_password_does_not_belong_into_an_address(self, file: Path) -> None:
        with pytest.raises(ConfigError, match="holds a user or a password") as caught:
            probe("http://me:word@localhost", file)
        assert "word@" not in str(caught.value)


class TestFile:
    def test_it_comes_back_as_it_was(self, file: Path, tmp_path: Path) -> None:
        probes = read_probe_file(file)
        write_probe_file(probes, tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
        assert read_probe_file(file.parent) == probes  # a folder that holds it will do

    def test_expectations_are_the_models(self, host: Any, file: Path) -> None:
        probes = read_probe_file(file)
        for one in probes.probes[:2]:
            for route, variant in ((None, "base"), ("a", "adapter")):
                ids = torch.tensor([one.token_ids])
                with torch.no_grad(), loralab.use(host, route):
                    rows = host(ids).logits[0].log_softmax(-1)
                said = rows[:-1].gather(-1, ids[0, 1:, None])[:, 0]
                torch.testing.assert_close(
                    torch.tensor(one.tokens[variant]), said, atol=1e-5, rtol=0
                )

    def test_making_probes_leaves_the_adapter_as_it_was(self, host: Any, words: Any) -> None:
        before = {n: p.detach().clone() for n, p in adapter_parameters(host, "a").items()}
        make_server_probes(host, "a", words, ["Two words and more."])
        for name, parameter in adapter_parameters(host, "a").items():
            assert torch.equal(parameter, before[name])

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda text: text[: len(text) // 2], "is no JSON"),
            (lambda text: text.replace('"reviews"', '"reviewz"'), "differs from what was saved"),
            (lambda text: "[1, 2]", "is no probe file of an export"),
            (lambda text: '{"adapter": "", "probes": []}', "an adapter's own probes.json"),
            (lambda text: text.replace('"version": 1', '"version": 9'), "of version 9"),
        ],
    )
    def test_damage_is_found(self, change: Any, said: str, file: Path, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_text(change(file.read_text()))
        with pytest.raises(ConfigError, match=said):
            read_probe_file(tmp_path / "p.json")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot be read.*\n.*`loralab export` wrote"):
            read_probe_file(tmp_path / "none.json")
