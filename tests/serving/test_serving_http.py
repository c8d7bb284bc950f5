"""The HTTP face, asked by the official client and by hand."""

import base64
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from served_adapters import llama, tokenizer, write_adapter_folder
from served_http import Server, serving

import loralab
from loralab.adapters import use
from loralab.errors import ConfigError
from loralab.serving.http import Keys, Limits, Quota, add_key, check_bind, read_keys

PROMPT = "A film about"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    write_adapter_folder(root / "reviews", seed=1)
    write_adapter_folder(root / "tweets", seed=2, rank=2)
    write_adapter_folder(root / "elsewhere", seed=3, probes=False)
    write_adapter_folder(root / "empty", seed=4, effect=0.0)
    return root


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[Server]:
    with serving(adapters) as made:
        yield made


def offline(adapters: Path, entry: Any, prompt: str, num_tokens: int) -> str:
    """What transformers' own `generate` answers, greedily."""
    model, reader = llama(), tokenizer()
    for name in entry if isinstance(entry, dict) else [entry] if entry else []:
        loralab.load_adapter(model, adapters / name, name)
    inputs = reader(prompt, return_tensors="pt")
    with torch.no_grad(), use(model, entry):
        made = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return str(reader.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


# the official client ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "entry"),
    [
        ("tiny", None),
        ("reviews", "reviews"),
        ("elsewhere", "elsewhere"),
        ("reviews=0.7,tweets=-0.3", {"reviews": 0.7, "tweets": -0.3}),
        ("reviews=0.5,tweets=-0.3,reviews=0.25", {"reviews": 0.75, "tweets": -0.3}),
        ("reviews=0", None),
    ],
)
def test_answers_are_those_of_transformers(
    server: Server, adapters: Path, model: str, entry: Any
) -> None:
    answer = server.openai.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == offline(adapters, entry, PROMPT, 12)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(PROMPT)
    for name in entry if isinstance(entry, dict) else [entry or "tiny"]:
        assert f"{name}@" in (answer.system_fingerprint or "")


def test_a_stream_is_the_same_answer(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tweets", "max_tokens": 9, "temperature": 0}
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    whole = server.openai.chat.completions.create(messages=turns, logprobs=True, **asked)
    parts = list(
        server.openai.chat.completions.create(
            messages=turns, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    texts = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].usage is not None and whole.usage is not None
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    assert parts[-1].usage.prompt_tokens_details is not None
    assert parts[-1].usage.prompt_tokens_details.cached_tokens  # of the answer before
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    content = whole.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content) == 9


def test_seeds_n_stop_and_logprobs(server: Server) -> None:
    asked: dict[str, Any] = {"model": "reviews", "prompt": PROMPT, "max_tokens": 10, "seed": 5}
    first = server.openai.completions.create(n=3, logprobs=2, **asked)
    again = server.openai.completions.create(n=3, **asked)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    told = first.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert all(1 <= len(best) <= 3 for best in told.top_logprobs)  # texts may coincide
    assert all(value is None or value <= 0 for value in told.token_logprobs)
    stop = texts[0][4]
    cut = server.openai.completions.create(stop=[stop], **asked)
    assert cut.choices[0].text == texts[0].partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_echo_scores_the_prompt(server: Server, adapters: Path) -> None:
    answer = server.openai.completions.create(
        model="reviews", prompt=PROMPT, echo=True, max_tokens=0, logprobs=0
    )
    model = llama()
    loralab.load_adapter(model, adapters / "reviews", "reviews")
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), use(model, "reviews"):
        chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = chances.gather(-1, ids[0, 1:, None])[:, 0]
    told = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT and told is not None and told.token_logprobs
    assert told.token_logprobs[0] is None
    assert torch.allclose(torch.tensor(told.token_logprobs[1:]), expected, atol=1e-4)


def test_embeddings(server: Server) -> None:
    plain = server.openai.embeddings.create(
        model="reviews", input=["one", "two"], encoding_format="float"
    )
    packed = server.post(
        "/v1/embeddings", {"model": "reviews", "input": "one", "encoding_format": "base64"}
    ).json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.allclose(vector, plain.data[0].embedding, atol=1e-6)
    assert math.isclose(float(np.linalg.norm(vector)), 1, abs_tol=1e-5)
    strange = server.post("/v1/embeddings", {"model": "reviews", "input": [[5], [2**31 - 1]]})
    assert strange.status_code == 400 and "token 2147483647 is none of" in strange.text
    base = server.openai.embeddings.create(model="tiny", input="one")
    assert not np.allclose(base.data[0].embedding, vector, atol=1e-3)


def test_models_tell_version_and_proof(server: Server) -> None:
    for name in ("reviews", "elsewhere"):
        server.openai.completions.create(model=name, prompt="x", max_tokens=1)
    cards = {card.id: card for card in server.openai.models.list().data}
    assert set(cards) == {"tiny", "reviews", "tweets", "elsewhere", "empty"}
    extra: Any = cards["reviews"].model_extra
    assert len(extra["version"]) == 64 and extra["parent"] == "tiny"
    assert extra["proof"]["state"] == "proved" and extra["proof"]["effect_nats"] > 0.1
    elsewhere: Any = server.openai.models.retrieve("elsewhere").model_extra
    assert elsewhere["proof"]["state"] == "unproved: no probes"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'reviews'"):
        server.openai.models.retrieve("review")


# what cannot be answered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "revews", "prompt": "x"}, 404, "Did you mean 'reviews'"),
        ({"model": "revews=0", "prompt": "x"}, 404, "Did you mean 'reviews'"),
        ({"model": "empty", "prompt": "x"}, 422, "no effect"),
        ({"model": "../reviews", "prompt": "x"}, 404, "there is no model '../reviews'"),
        ({"model": "reviews=x", "prompt": "x"}, 400, "not of the form name=weight"),
        ({"model": "reviews=1,tiny=1", "prompt": "x"}, 400, "'tiny' is the base"),
        ({"model": "reviews=1,tweets=1,elsewhere=1", "prompt": "x"}, 400, "this server has 2"),
        ({"model": "tiny", "prompt": "y" * 200}, 400, "more than this server's 128"),
        ({"model": "tiny", "prompt": ""}, 400, "prompt"),
        ({"model": "tiny", "prompt": "x", "stream_options": {}}, 400, "for stream=true alone"),
        ({"model": "tiny", "prompt": "x", "max_tokens": "7"}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "temprature": 1}, 400, "temprature: Extra inputs"),
        ({"model": "tiny", "prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
        ({"model": "tiny", "prompt": [999999]}, 400, "token 999999 is none of"),
        ({"model": "tiny"}, 400, "prompt: Field required"),
        ([], 400, "valid dictionary"),
    ],
)
def test_faults_have_openais_shape(server: Server, body: Any, status: int, words: str) -> None:
    answer = server.post("/v1/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_bodies_that_are_none(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"model": 1e999}'):
        answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    half = httpx.post(
        f"{server.url}/v1/completions",
        content=rb'{"model": "tiny", "prompt": "\ud800"}',
        headers=headers,
    )
    assert half.status_code == 400 and "lone surrogate" in half.text
    large = httpx.post(f"{server.url}/v1/completions", content=b"x" * (2**20 + 1), headers=headers)
    assert large.status_code == 413
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"


def test_other_hosts_are_refused(server: Server) -> None:
    answer = server.post("/v1/completions", {}, headers={"Host": "evil.example:80"})
    assert answer.status_code == 403 and "this machine alone" in answer.text


def test_the_openai_client_raises_its_own_errors(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError, match="exactly as the base does"):
        server.openai.completions.create(model="empty", prompt="x", stream=True)


# adapters come and go -----------------------------------------------------------------------------


def test_loading_and_unloading(server: Server, adapters: Path) -> None:
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "tweets"})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["model"]["proof"]["state"] == "proved"
    again = server.post("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "tweets"})
    assert again.status_code == 409 and "loaded already" in again.text
    beside = server.post("/v1/load_lora_adapter", {"lora_name": "reviews", "lora_path": "tweets"})
    assert beside.status_code == 409 and "there is a folder 'reviews' beside" in beside.text
    pinned = {"lora_name": "other", "lora_path": "tweets", "load_inplace": True, "pinned": True}
    assert server.post("/v1/load_lora_adapter", pinned).json()["model"]["pinned"] is True
    more = {"lora_name": "more", "lora_path": "reviews", "pinned": True}
    full = server.post("/v1/load_lora_adapter", more)
    assert full.status_code == 409 and "one must stay free of pinned adapters" in full.text
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "more"}).status_code == 200
    for path in (str(adapters / "tweets"), "../tweets", "a/b", "~", "hub/model"):
        outside = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert outside.status_code == 403, path
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "other"}).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "other"}).status_code == 404
    missing = server.post("/v1/load_lora_adapter", {"lora_name": "y", "lora_path": "nothing"})
    assert missing.status_code == 404


def test_the_document_has_what_the_model_can(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert "/v1/completions" in paths and "/v1/embeddings" in paths
    assert "/v1/classify" not in paths
    refused = server.post("/v1/classify", {"model": "tiny", "input": "x"})
    assert refused.status_code == 400 and "has no classification head" in refused.text


def test_metrics_are_per_adapter(server: Server) -> None:
    server.openai.completions.create(model="reviews", prompt="abc", max_tokens=2)
    refused = server.post("/v1/completions", {"model": "empty", "prompt": "abc"})
    assert refused.status_code == 422
    text = server.get("/metrics").text
    for line in (
        'loralab_requests_total{adapter="reviews",outcome="answered"}',
        'loralab_tokens_total{adapter="reviews",kind="answer"}',
        'loralab_time_to_first_token_seconds_count{adapter="reviews"}',
        'loralab_adapter_loads_total{adapter="reviews"}',
        'loralab_adapter_proof{adapter="reviews",state="proved"} 1.0',
        'loralab_adapter_proof{adapter="empty",state="refused"} 1.0',
        "loralab_slots 2.0",
    ):
        assert line in text
    assert "revews" not in text


# clients that go away, and time -------------------------------------------------------------------


def wait_for(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: Server, stream: bool) -> None:
    body = {"model": "reviews", "prompt": "x", "max_tokens": 120, "ignore_eos": True, "n": 8}
    engine, store = server.service.engine, server.service.store
    with httpx.Client(timeout=30) as client:
        if stream:
            with client.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": True}
            ) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/completions", json=body, timeout=0.05)
    wait_for(lambda: engine.stats()["running"] == 0 and engine.stats()["waiting"] == 0)
    wait_for(lambda: all(state.num_leases == 0 for state in store.describe()))


def test_keys_quotas_and_limits(adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    use_key, admin_key = add_key(file, "alice"), add_key(file, "ops", admin=True)
    assert use_key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    text = file.read_text().replace('adapters = ["*"]', 'adapters = ["reviews"]', 1)
    file.write_text(
        text + "\n[quotas.reviews]\nconcurrent = 1\n[quotas.tiny]\ntokens_per_minute = 4\n"
    )
    limits = Limits(request_seconds=0.5, max_in_flight=16)
    with serving(adapters, keys=read_keys(file), limits=limits) as server:
        body = {"model": "reviews", "prompt": "x", "max_tokens": 1}
        missing = server.post("/v1/completions", body)
        assert missing.status_code == 401 and missing.headers["WWW-Authenticate"] == "Bearer"
        server.key = use_key
        assert server.post("/v1/completions", body).status_code == 200
        for name in ("tweets", "tiny", "no-such", "reviews=1,tweets=1"):
            barred = server.post("/v1/completions", {**body, "model": name})
            assert barred.status_code == 403 and "this key may not use" in barred.text
        assert [card.id for card in server.openai.models.list().data] == ["reviews"]
        load = {"lora_name": "x", "lora_path": "tweets"}
        assert server.post("/v1/load_lora_adapter", load).status_code == 403
        assert server.get("/metrics").status_code == 403
        two = server.post("/v1/completions", {**body, "n": 2})
        assert two.status_code == 429 and int(two.headers["Retry-After"]) >= 1
        server.key = admin_key
        assert server.get("/metrics").status_code == 200
        tiny = {**body, "model": "tiny"}
        assert server.post("/v1/completions", {**tiny, "prompt": "12345"}).status_code == 200
        spent = server.post("/v1/completions", tiny)
        assert spent.status_code == 429 and int(spent.headers["Retry-After"]) > 10
        full = server.post("/v1/completions", {**body, "model": "tweets", "prompt": ["x"] * 11})
        assert full.status_code == 200
        more = {**body, "model": "tweets", "prompt": ["x"] * 12}
        assert server.post("/v1/completions", more).status_code == 503


def test_a_slow_answer_ends_in_time(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(adapters, limits=Limits(request_seconds=0.3)) as server:
        runner: Any = server.service.engine.runner
        step = runner.forward
        monkeypatch.setattr(runner, "forward", lambda chunks: (time.sleep(0.05), step(chunks))[1])
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True}
        late = server.post("/v1/completions", body)
        assert late.status_code == 504 and "longer than 0.3 seconds" in late.text
        streamed = server.post("/v1/completions", {**body, "stream": True})
        last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
        assert streamed.status_code == 200 and last["error"]["code"] == "timeout"
        wait_for(lambda: server.service.engine.stats()["running"] == 0)


def test_a_full_engine_is_503_with_retry_after(adapters: Path) -> None:
    with serving(adapters, max_batch_size=1, limits=Limits(max_in_flight=4)) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "ignore_eos": True}
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(server.post("/v1/completions", body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 503}
        assert server.post("/v1/completions", {**body, "max_tokens": 1}).status_code == 200


# keys ---------------------------------------------------------------------------------------------


def test_an_open_bind_needs_keys() -> None:
    with pytest.raises(ConfigError, match="lets other machines in, and there are no keys") as error:
        check_bind("0.0.0.0", Keys())
    assert "--add-key NAME" in error.value.next_step
    for host in ("127.0.0.1", "::1", "localhost"):
        check_bind(host, Keys())


def test_a_file_of_keys_lists_its_faults_and_shows_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[keys.a]\nsha256 = "my-secret-key"\nadmn = true\n[quotas.b]\nconcurrent = 0\n')
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    for place in ("keys.a.sha256", "keys.a.admn", "quotas.b.concurrent"):
        assert place in caught.value.cause
    assert "my-secret-key" not in str(caught.value)
    assert Quota().concurrent is None
