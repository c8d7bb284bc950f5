"""The law of the whole room: under load, with adapters coming, going and changing, every answer is
the offline answer of the adapter that it was leased."""

import random
import shutil
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from serving_models import NEAR, PeftOracle, Receiver, byte_tokenizer, peft_adapter, tiny_llama

from loralab.adapters import content_hash, read_adapter
from loralab.errors import AdapterError, CapacityError
from loralab.serving import Engine, MergedMode, MergePolicy, PlainRunner, Request, Sampling
from loralab.serving.fast import fast_runner
from loralab.serving.place import EnginePlace
from loralab.serving.runner import Runner
from loralab.serving.store import AdapterStore, Registry, identity

NUM_ADAPTERS, NUM_REQUESTS, NUM_CLIENTS = 64, 500, 12


def spare(folder: Path) -> Path:
    """Where the second content of a name waits."""
    return folder.parent.parent / "spare" / folder.name


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, root = tiny_llama(), tmp_path_factory.mktemp("room") / "registry"
    for number in range(NUM_ADAPTERS):
        folder = root / f"a{number}"
        peft_adapter(base, folder, rank=1 + number % 12, seed=number)
        if number % 4 == 0:
            peft_adapter(base, spare(folder), rank=1 + number % 5, seed=1000 + number)
    return root


class Client(threading.Thread):
    """Asks for random adapters, sometimes two mixed or none, and keeps what it got."""

    def __init__(self, engine: Engine, store: AdapterStore, seed: int, count: int) -> None:
        super().__init__()
        self.engine, self.store, self.count = engine, store, count
        self.draw = random.Random(seed)
        self.answers: list[tuple[tuple[int, ...], dict[str, float], Receiver]] = []

    def run(self) -> None:
        while len(self.answers) < self.count:
            wanted = self.draw.choices([0, 1, 2], [1, 8, 1])[0]
            names = [f"a{self.draw.randrange(NUM_ADAPTERS)}" for _ in range(wanted)]
            try:
                lease = self.store.lease(names).result(timeout=600)
            except (AdapterError, CancelledError):
                continue  # it is unloaded just now
            with lease:
                weights = {version: 1 / len(lease.versions) for version in lease.versions}
                prompt = tuple(
                    self.draw.randrange(97, 123) for _ in range(self.draw.randrange(1, 30))
                )
                done, receiver = threading.Event(), Receiver()
                entry = {version.hosted: weight for version, weight in weights.items()}
                request = Request(
                    prompt,
                    next(iter(entry)) if len(entry) == 1 else entry or None,
                    identity(weights),
                    Sampling(max_tokens=8, temperature=0, ignore_eos=True),
                    tenant=" ".join(names),
                )

                def deliver(piece, receiver=receiver, done=done) -> None:
                    receiver(piece)
                    if piece.finish_reason:
                        done.set()

                self.engine.submit(request, deliver)
                assert done.wait(timeout=600)
            contents = {version.content: weight for version, weight in weights.items()}
            self.answers.append((prompt, contents, receiver))


def disturb(store: AdapterStore, registry: Path, stop: threading.Event) -> None:
    """Unloads, loads and replaces adapters until told to stop."""
    draw = random.Random(7)
    while not stop.is_set():
        name = f"a{draw.randrange(NUM_ADAPTERS)}"
        folder = registry / name
        other = spare(folder)
        if other.exists():  # a rename, as everything that replaces an adapter does it
            aside = other.with_name(f"{name} aside")
            folder.rename(aside)
            other.rename(folder)
            aside.rename(other)
        else:
            store.unload(name)
            time.sleep(0.01)
            try:
                store.load(name, name).result(timeout=600).release()
            except (CancelledError, CapacityError):
                return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_every_answer_is_the_offline_answer_of_its_adapter(kind, registry, tmp_path):
    shutil.copytree(registry.parent, tmp_path / "room")
    root = tmp_path / "room" / "registry"
    model = tiny_llama()

    def plain() -> Runner:
        return PlainRunner(model, num_slots=8, max_tokens=64)

    runner = plain()
    if kind == "fast":
        runner = fast_runner(model, plain, num_slots=8, max_tokens=64)
        assert not isinstance(runner, PlainRunner)
    merging = MergedMode(model, MergePolicy(saving=0.5, cost_seconds=0.01))
    engine = Engine(runner, byte_tokenizer(), merging=merging, prefill_tokens=32)
    place = EnginePlace(engine, model, prompts=[(97, 98, 99)], cache=tmp_path / "proofs")
    engine.start()
    store = AdapterStore(Registry(root), place, num_slots=12)
    stop = threading.Event()
    trouble = threading.Thread(target=disturb, args=(store, root, stop))
    each = -(-NUM_REQUESTS // NUM_CLIENTS)
    clients = [Client(engine, store, seed, each) for seed in range(NUM_CLIENTS)]
    try:
        for thread in (trouble, *clients):
            thread.start()
        for client in clients:
            client.join(timeout=900)
    finally:
        stop.set()
        trouble.join(timeout=60)
        store.close()
        engine.close()
    answers = [answer for client in clients for answer in client.answers]
    assert len(answers) >= NUM_REQUESTS
    check_all(answers, registry)


def check_all(answers, registry: Path) -> None:
    """PEFT's logits after every token of each answer: the token is best, or as good as best."""
    folders = [*registry.iterdir(), *(registry.parent / "spare").iterdir()]
    by_content = {content_hash(read_adapter(folder)): folder for folder in folders}
    names = {content: f"n{number}" for number, content in enumerate(by_content)}
    oracle = PeftOracle(
        tiny_llama(), {names[content]: folder for content, folder in by_content.items()}
    )
    seen = set()
    for prompt, contents, receiver in answers:
        assert receiver.reason == "length", receiver.pieces[-1].error
        seen |= contents.keys()
        weights = {names[content]: weight for content, weight in contents.items()}
        entry = next(iter(weights)) if len(weights) == 1 else weights or None
        tokens = [*prompt, *receiver.tokens]
        logits = oracle.run(entry, lambda t=tokens: oracle.model(torch.tensor([t])).logits[0])
        for place, token in enumerate(receiver.tokens, len(prompt) - 1):
            assert float(logits[place].max() - logits[place, token]) < NEAR, (entry, place)
    assert len(seen) > 0.8 * NUM_ADAPTERS
