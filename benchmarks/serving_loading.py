"""What a load adds to the first token of a request, through the store and the engine.

Beside `serving.py`, which has the model, its runner and folders of adapters.
"""

import itertools
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from loralab.models import load_tokenizer
from loralab.serving import Engine, Request, Sampling
from loralab.serving.place import EnginePlace
from loralab.serving.runner import Runner
from loralab.serving.store import AdapterStore, Lease, Registry, identity
from loralab.serving.store.reading import Limits, Reader

PROMPT_TOKENS = 24
ROUNDS = 3
SECONDS = 60
_fresh = itertools.count(1)


def load_times(model: nn.Module, runner: Runner, folder: Path) -> dict[str, float]:
    """`load_ms` and `load_ms_read_ahead`, medians over the folders' adapters and some rounds."""
    engine = Engine(runner, load_tokenizer("smollm2"))
    engine.start()
    seconds: dict[str, list[float]] = {"disk": [], "memory": [], "slot": []}
    try:
        with tempfile.TemporaryDirectory() as proofs:
            place = EnginePlace(engine, model, prompts=[tuple(range(20, 30))], cache=Path(proofs))
            for turn in range(ROUNDS + 1):
                made = _one_round(engine, place, folder)
                if turn:  # the first proves
                    for case, found in made.items():
                        seconds[case] += found
    finally:
        engine.close()
    middle = {case: 1000 * statistics.median(found) for case, found in seconds.items()}
    return {
        "load_ms": round(middle["disk"] - middle["slot"], 2),
        "load_ms_read_ahead": round(middle["memory"] - middle["slot"], 2),
        "first_token_ms": round(middle["slot"], 2),
    }


def _one_round(engine: Engine, place: EnginePlace, folder: Path) -> dict[str, list[float]]:
    registry = Registry(folder)
    names = registry.names()
    store = AdapterStore(registry, place, num_slots=2 * len(names))
    reader = Reader(registry, Limits(), place.misfits)
    store.survey()
    made: dict[str, list[float]] = {"disk": [], "memory": [], "slot": []}
    versions = []
    for index, name in enumerate(names):
        if index % 2:  # read before, as for a request that waits for a slot
            stored = reader.read(name)
            state = next(s for s in store.describe() if s.name == name)
            assert state.version is not None
            store._memory.put(state.version, stored.adapter, lambda version: True)
        case = "memory" if index % 2 else "disk"
        seconds, lease = _first_token(engine, store, name)
        made[case].append(seconds)
        lease.release()
        seconds, lease = _first_token(engine, store, name)
        made["slot"].append(seconds)
        versions += lease.versions
        lease.release()
    store.wait_until_idle(SECONDS)
    store.close()
    for version in versions:
        place.detach(version)
    return made


def _first_token(engine: Engine, store: AdapterStore, name: str) -> tuple[float, Lease]:
    """Seconds from the request to its first token; every prompt is one that was never read."""
    first = next(_fresh)
    prompt = (first, *((37 * i + first) % 40000 for i in range(1, PROMPT_TOKENS)))
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    started = time.perf_counter()
    lease = store.lease([name]).result(SECONDS)
    [version] = lease.versions
    sampling = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
    request = Request(prompt, version.hosted, identity({version: 1.0}), sampling, name)
    engine.submit(request, pieces.put)
    pieces.get(timeout=SECONDS)
    return time.perf_counter() - started, lease
