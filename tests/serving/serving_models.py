"""Tiny random models, adapters that PEFT made, and a tokenizer with a token a byte."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from loralab.serving.engine import Engine
from loralab.serving.requests import Entry, Piece, Request, Sampling

VOCAB = 264
END = 256
RANKS = {"one": 1, "two": 2, "four": 4, "six": 6, "eight": 8, "three": 3}
TARGETS: list[Any] = ["all-linear", ["q_proj", "c_attn", "down_proj"], ["v_proj", "o_proj", "c_fc"]]
NEAR = 1e-4  # two best logits this close may change places by rounding


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 257,
        "eos_token_id": END,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the byte i; the end token is special."""
    alphabet = _byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(alphabet)}
    extra = ["<end>", "<start>", *(f"<{n}>" for n in range(258, VOCAB))]
    vocabulary.update({word: 256 + n for n, word in enumerate(extra)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def peft_adapter(base: PreTrainedModel, folder: Path, rank: int, seed: int) -> None:
    """A random adapter, written by PEFT; which layers it has depends on the seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[seed % 3])
        theirs: Any = get_peft_model(copy.deepcopy(base), config)  # pyright: ignore
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        theirs.save_pretrained(folder)


class PeftOracle:
    """transformers `generate` with PEFT's own reading of the folders, one request at a time."""

    def __init__(self, base: PreTrainedModel, folders: dict[str, Path]) -> None:
        first, *others = folders
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = PeftModel.from_pretrained(
                copy.deepcopy(base), folders[first], adapter_name=first
            )
            for name in others:
                model.load_adapter(folders[name], adapter_name=name)
        self.model = model.eval()

    def run(self, entry: Entry, function: Any) -> Any:
        """The function's result with the adapters of that entry in force."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if entry is None:
                with self.model.disable_adapter():
                    return function()
            name = entry if isinstance(entry, str) else self._mixed(dict(entry))
            self.model.set_adapter(name)
            return function()

    def greedy(self, prompt: Sequence[int], entry: Entry, num_tokens: int) -> list[int]:
        def produce() -> list[int]:
            out = self.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            return out[0, len(prompt) :].tolist()

        return self.run(entry, produce)

    def logits(self, tokens: Sequence[int], entry: Entry) -> Tensor:
        """After the last token."""
        return self.run(entry, lambda: self.model(torch.tensor([tokens])).logits[0, -1].float())

    def _mixed(self, mix: dict[str, float]) -> str:
        name = "mix " + " ".join(f"{n}{w}".replace(".", "_") for n, w in mix.items())
        if name not in self.model.peft_config:
            self.model.add_weighted_adapter(list(mix), list(mix.values()), name, "cat")
        return name

    def assert_greedy(self, prompt: Sequence[int], entry: Entry, answer: list[int]) -> None:
        """Our answer is the oracle's, or leaves it where the two best logits are as good as equal.

        After such a place the oracle is asked again, going on from our token.
        """
        done = 0
        while done < len(answer):
            start = [*prompt, *answer[:done]]
            theirs = self.greedy(start, entry, len(answer) - done)
            same = 0
            while same < len(theirs) and theirs[same] == answer[done + same]:
                same += 1
            if done + same == len(answer):
                return
            assert same < len(theirs), (entry, answer, theirs)
            logits = self.logits([*start, *theirs[:same]], entry)
            ours = float(logits[answer[done + same]])
            assert float(logits.max()) - ours < NEAR, (entry, done + same, answer, theirs)
            done += same + 1


class Receiver:
    """Collects the pieces of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)

    @property
    def tokens(self) -> list[int]:
        return [piece.token_id for piece in self.pieces if piece.token_id is not None]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None


def ask(
    engine: Engine,
    prompt: Iterable[int] | str,
    entry: Entry = None,
    *,
    tenant: str = "",
    identity: str | None = None,
    **sampling: Any,
) -> Receiver:
    """Submits a request; greedy unless told otherwise."""
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
    settings = Sampling(**{"temperature": 0, **sampling})
    who = repr(entry) if identity is None and entry is not None else identity or ""
    receiver = Receiver()
    engine.submit(Request(ids, entry, who, settings, tenant), receiver)
    return receiver


def finish(engine: Engine) -> None:
    """Steps until nothing is left to do."""
    while engine.step():
        pass


def answer(engine: Engine, *args: Any, **kwargs: Any) -> Receiver:
    """Asks and waits."""
    receiver = ask(engine, *args, **kwargs)
    finish(engine)
    return receiver
