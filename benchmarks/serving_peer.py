"""llama.cpp's tokens a second, in a process of its own: beside torch it gets half of them.

    python benchmarks/serving_peer.py MODEL.gguf FOLDER_OF_ADAPTERS --threads 2

The folder holds a0.gguf ... a7.gguf. One request has a server of its own, for one sequence and with
one adapter: its best settings. Prompts are one token. Called by serving.py.
"""

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BATCH, CONTEXT, NEW_TOKENS = 32, 256, 96


def main() -> None:
    """Measures and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    single = LlamaServer(given, 1, 1)
    figures = {
        "one_request": max(single.rate([0]) for _ in range(3)),
        "one_base": max(single.rate([None]) for _ in range(3)),
    }
    del single  # two servers hold each other up
    many = LlamaServer(given, BATCH, 8)
    figures["base"] = many.rate([None] * BATCH, 48)
    in_turn, in_groups = [i % 8 for i in range(BATCH)], [i // 4 for i in range(BATCH)]
    figures["eight_adapters"] = max(many.rate(each, 24) for each in (in_turn, in_groups))
    print(json.dumps(figures))


class LlamaServer:
    """llama.cpp with so many sequences at once and so many adapters."""

    def __init__(self, given: argparse.Namespace, num_sequences: int, num_adapters: int) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(given.model)
        settings.n_parallel, settings.n_ctx = num_sequences, num_sequences * CONTEXT
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = given.threads
        settings.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(given.folder / f"a{i}.gguf"), 0.0)
            for i in range(num_adapters)
        ]
        settings.fit_params, settings.verbosity = False, -1
        self._server, self._num_adapters = xllamacpp.Server(settings), num_adapters
        self._ask(None, 8)

    def rate(self, adapters: Sequence[int | None], new_tokens: int = NEW_TOKENS) -> float:
        """Tokens a second of all these requests together."""
        with ThreadPoolExecutor(len(adapters)) as pool:
            start = time.perf_counter()
            count = sum(pool.map(lambda adapter: self._ask(adapter, new_tokens), adapters))
            return round(count / (time.perf_counter() - start), 1)

    def _ask(self, adapter: int | None, new_tokens: int) -> int:
        request = {
            "prompt": "The",
            "n_predict": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": i, "scale": float(i == adapter)} for i in range(self._num_adapters)],
        }
        return int(self._server.handle_completions(request)["usage"]["completion_tokens"])


if __name__ == "__main__":
    main()
