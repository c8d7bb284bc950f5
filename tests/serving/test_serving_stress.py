"""64 adapters, 500 requests, loads and unloads meanwhile: each answer is its adapter's own."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served_adapters import llama, tokenizer, write_adapter_folder
from served_http import Server, serving

import loralab
from loralab.adapters import detach, use

NUM_ADAPTERS, NUM_REQUESTS, NUM_TOKENS = 64, 500, 12
CLIENTS = 16
CLOSE = 1e-4  # two best logits this close may change places by rounding


def prompt_of(number: int) -> str:
    """Five openings, so that prefixes of other adapters lie ready to be mixed up."""
    return ("A film about", "A film about a", "Dear", "def f(x):", "Once")[number % 5]


def greedy(model: Any, prompt: str, name: str) -> tuple[str, float]:
    """transformers' own answer, and the smallest lead of a chosen token over the next best."""
    reader = tokenizer()
    inputs = reader(prompt, return_tensors="pt")
    with torch.no_grad(), use(model, name):
        made = model.generate(
            **inputs,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.cat(made.logits).topk(2).values
    new = made.sequences[0, inputs["input_ids"].shape[1] :]
    text = str(reader.decode(new, skip_special_tokens=True))
    return text, float((best[:, 0] - best[:, 1]).min())


def disturb(server: Server, root: Path, stop: threading.Event) -> None:
    """Loads, unloads, and rewrites folders (with the same adapter) at random."""
    draw = random.Random(1)
    while not stop.wait(0.02):
        name = f"a{draw.randrange(NUM_ADAPTERS)}"
        kind = draw.randrange(3)
        if kind == 0:
            server.post("/v1/unload_lora_adapter", {"lora_name": name})
        if kind <= 1:
            body = {"lora_name": name, "lora_path": name, "load_inplace": True}
            server.post("/v1/load_lora_adapter", body)
        else:
            shutil.copytree(root / name, root / f".{name}")
            (root / name).rename(root / f".{name}.old")
            (root / f".{name}").rename(root / name)
            shutil.rmtree(root / f".{name}.old")


@pytest.mark.slow
def test_every_answer_is_its_adapters_own(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    for number in range(NUM_ADAPTERS):
        write_adapter_folder(root / f"a{number}", seed=number + 1, rank=1 + number % 8)
    asked = [
        (f"a{random.Random(n).randrange(NUM_ADAPTERS)}", prompt_of(n)) for n in range(NUM_REQUESTS)
    ]
    model = llama()
    expected: dict[tuple[str, str], tuple[str, float]] = {}
    for name in sorted({name for name, _ in asked}):
        loralab.load_adapter(model, root / name, name)
        for prompt in {prompt for other, prompt in asked if other == name}:
            expected[name, prompt] = greedy(model, prompt, name)
        detach(model, name)

    proofs = tmp_path / "proofs"  # as a real server: what was proved once is known
    with serving(root, num_slots=8, max_batch_size=16, proofs=proofs) as server:
        stop = threading.Event()
        trouble = threading.Thread(target=disturb, args=(server, root, stop))
        trouble.start()

        def ask(request: tuple[str, str]) -> str:
            """Unloaded and rewritten folders are unknown for a moment: asked again then."""
            name, prompt = request
            body = {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
            while True:
                answer: httpx.Response = server.post("/v1/completions", body)
                if answer.status_code == 200:
                    told = answer.json()
                    assert told["system_fingerprint"].startswith(f"{name}@")
                    return str(told["choices"][0]["text"])
                assert answer.status_code in (404, 503), answer.text

        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(ask, asked))
        stop.set()
        trouble.join()
        assert server.service.store.wait_until_idle(60)
        assert server.service.engine.stats()["running"] == 0
    wrong = [
        (request, answer, expected[request])
        for request, answer in zip(asked, answers, strict=True)
        if answer != expected[request][0] and expected[request][1] > CLOSE
    ]
    assert len(answers) == NUM_REQUESTS and not wrong
