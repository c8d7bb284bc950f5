"""What the engine itself costs: milliseconds of one core a step of 32 answers, model left out.

python benchmarks/serving_engine.py --json
"""

import argparse
import json
import platform
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from loralab.adapters import Adapter
from loralab.models import load_tokenizer
from loralab.serving import Chunk, Engine, Request, Sampling

ROWS, VOCAB, STEPS = 32, 49_152, 30
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "stop": {"temperature": 0, "stop": ("\n\n", "User:")},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0, "logprobs": 2},
}


class NoModel:
    """A runner that computes nothing; its logits are about as peaked as a language model's."""

    num_slots, max_tokens, vocab_size = ROWS, 2048, VOCAB

    def __init__(self) -> None:
        self.logits = 4 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return self.logits[: len(chunks)]

    def all_logits(self, chunk: Chunk) -> torch.Tensor:
        return self.logits[: len(chunk.token_ids)]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        pass

    def prepare(self, name: str, adapter: Adapter) -> None:
        pass

    def adapters_changed(self, only: Collection[str] | None = None) -> None:
        pass


def step_ms(tokenizer: Any, sampling: dict[str, Any]) -> float:
    """Processor time of a step once all prompts are read."""
    engine = Engine(NoModel(), tokenizer, eos_ids=[])
    for row in range(ROWS):
        settings = Sampling(max_tokens=1000, seed=row, ignore_eos=True, **sampling)
        request = Request((row,) * 100, f"a{row % 8}", str(row % 8), settings, f"t{row % 8}")
        engine.submit(request, lambda piece: None)
    while engine.stats()["generated_tokens"] < 2 * ROWS:
        engine.step()
    started = time.process_time()
    for _ in range(STEPS):
        engine.step()
    return 1000 * (time.process_time() - started) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("smollm2")
    found = {name: round(step_ms(tokenizer, case), 2) for name, case in CASES.items()}
    if arguments.json:
        facts = {"machine": platform.processor(), "torch": torch.__version__}
        print(json.dumps({"step_ms": found, "rows": ROWS, "vocab": VOCAB, **facts}, indent=2))
        return
    for name, milliseconds in found.items():
        print(f"{name:20} {milliseconds:6.2f} ms")


if __name__ == "__main__":
    main()
