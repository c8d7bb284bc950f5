"""What other engines take: one table of facts, each with the place in their source that says so."""

from dataclasses import dataclass
from typing import Literal

from loralab.adapters import Adapter
from loralab.errors import ConfigError, nearest

# What an adapter may hold beside pairs on linear layers of a decoder's blocks.
Part = Literal[
    "DoRA",
    "biases",
    "token rows",
    "pairs on embeddings",
    "pairs on the output head",
    "pairs on convolutions",
    "pairs on attention modules",
    "whole modules",
]
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
OUTPUT_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Engine:
    """What an engine takes of an adapter.

    version: the release whose source the facts are from.
    form: of the files: PEFT's folder, or GGUF.
    carries: which parts it applies as they were trained.
    heads: the whole modules it takes, by the last part of their names.
    rank_limits: the values that its limit on ranks can have; none: any rank.
    stacked: groups of modules that it stacks into one, as (those that must all be there, those
        that may be missing); a group of which one is missing is read wrongly or not at all.
    names_only: it takes a list of module names, no regular expression.
    why: part -> the line of its source that refuses it, or leaves it out.
    """

    name: str
    version: str
    form: Literal["peft", "gguf"]
    carries: frozenset[Part]
    why: dict[Part, str]
    heads: tuple[str, ...] = ()
    rank_limits: tuple[int, ...] = ()
    stacked: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    names_only: bool = False

    def rank_limit(self, rank: int) -> int | None:
        """The least limit that lets the rank through; None where there is none."""
        if not self.rank_limits:
            return rank
        return next((limit for limit in self.rank_limits if limit >= rank), None)


_GGUF_WHY: dict[Part, str] = {
    # ggml-org/llama.cpp: convert_lora_to_gguf.py takes tensors that end in .lora_A/.lora_B only
    "DoRA": "a GGUF adapter holds A and B alone (src/llama-adapter.cpp: suffixes .lora_a, .lora_b)",
    "biases": "a GGUF adapter holds A and B alone (src/llama-adapter.cpp)",
    "token rows": "a GGUF adapter holds A and B alone (src/llama-adapter.cpp)",
    "whole modules": "a GGUF adapter holds A and B alone (src/llama-adapter.cpp)",
    "pairs on convolutions": "only products of weights are adapted (src/llama-graph.cpp)",
    "pairs on attention modules": "only products of weights are adapted (src/llama-graph.cpp)",
}

_PEFT = Engine(
    name="peft",
    version="0.21.2",
    form="peft",
    # its own format: what it cannot hold is refused by `write_adapter`, module by module
    carries=frozenset(
        (
            "DoRA",
            "biases",
            "token rows",
            "pairs on embeddings",
            "pairs on the output head",
            "pairs on convolutions",
            "pairs on attention modules",
            "whole modules",
        )
    ),
    why={},
)

_VLLM = Engine(
    name="vllm",
    version="0.33.0",
    form="peft",
    # model_executor/models/llama.py: embedding_modules = {"embed_tokens": ..., "lm_head": ...}
    carries=frozenset(("pairs on embeddings", "pairs on the output head")),
    why={
        "DoRA": "lora/peft_helper.py: use_dora is refused",
        "biases": 'lora/peft_helper.py: bias other than "none" is refused',
        "token rows": "lora/utils.py: parse_fine_tuned_lora_name knows no such tensor",
        "pairs on convolutions": "lora/utils.py: is_supported_lora_module lists linear layers",
        "pairs on attention modules": "lora/utils.py: is_supported_lora_module",
        "whole modules": "lora/peft_helper.py: modules_to_save other than classifier, score",
    },
    heads=("classifier", "score"),  # lora/peft_helper.py; one of them (lora/lora_model.py)
    rank_limits=(1, 8, 16, 32, 64, 128, 256, 320, 512),  # config/lora.py: MaxLoRARanks
)

_SGLANG = Engine(
    name="sglang",
    version="0.5.23",
    form="peft",
    # srt/lora/lora.py: _process_weight keeps tensors of numbered layers, embed_tokens and lm_head
    carries=frozenset(("pairs on embeddings", "pairs on the output head")),
    why={
        "DoRA": "srt/lora/lora_manager.py: validate_new_adapter refuses use_dora",
        "biases": "srt/lora/lora.py: _process_weight never applies them, without a word",
        "token rows": "srt/lora/lora_manager.py: adapters that add tokens are refused",
        "pairs on convolutions": "srt/lora/layers.py: linear layers and embeddings only",
        "pairs on attention modules": "srt/lora/layers.py: linear layers and embeddings only",
        "whole modules": "srt/lora/lora.py: _process_weight drops them without a word",
    },
    # srt/lora/lora.py: normalize_qkv_proj starts at q_proj and fails without v_proj;
    # normalize_gate_up_proj starts at gate_proj, so that a lone up_proj is left out
    stacked=(
        (("q_proj", "v_proj"), ("k_proj",)),
        (("gate_proj",), ("up_proj",)),
    ),
    names_only=True,  # srt/lora/utils.py: get_normalized_target_modules
)

_LLAMA_CPP = Engine(
    name="llama.cpp",
    version="2026.10 (xllamacpp 2026.10.11549)",
    form="gguf",
    # src/llama-graph.cpp: build_lora_mm is used for the output, build_inp_embd for embeddings
    carries=frozenset(("pairs on embeddings", "pairs on the output head")),
    why=_GGUF_WHY,
)

_OLLAMA = Engine(
    name="ollama",
    version="docs.ollama.com/import, 2026",
    form="gguf",  # ADAPTER takes a GGUF file; it is run by llama.cpp's code
    carries=_LLAMA_CPP.carries,
    why=_GGUF_WHY,
)

ENGINES = {engine.name: engine for engine in (_VLLM, _SGLANG, _PEFT, _LLAMA_CPP, _OLLAMA)}


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises `ConfigError` with the nearest one."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}", nearest(name, ENGINES))
    return ENGINES[name]


def parts_of(adapter: Adapter) -> dict[Part, list[str]]:
    """What the adapter holds beside pairs on linear layers -> the modules concerned."""
    found: dict[Part, list[str]] = {}

    def note(part: Part, name: str) -> None:
        found.setdefault(part, []).append(name)

    for path in adapter.pairs:
        layer, last = adapter.layer(path), path.rpartition(".")[2]
        if layer.kind == "embedding" or last in EMBEDDINGS:
            note("pairs on embeddings", path)
        elif layer.kernel:
            note("pairs on convolutions", path)
        elif layer.kind == "attention":
            note("pairs on attention modules", path)
        elif last in OUTPUT_HEADS:
            note("pairs on the output head", path)
    for path in adapter.magnitudes:
        note("DoRA", path)
    for path in adapter.token_rows:
        note("token rows", path)
    for path in adapter.whole_modules:
        note("whole modules", path)
    whole = tuple(f"{path}." for path in adapter.whole_modules)
    for name in adapter.extra:
        if not name.startswith(whole):
            note("biases", name)
    return found
