"""An engine's own command line for an export, and what else it wants to be told."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.exporting.engines import Engine


@dataclass(frozen=True)
class Launch:
    """How an export is started and asked.

    commands: argument lists, run one after the other in the export's folder; none for a library.
    url, model: where the engine then listens, and the name to ask for; empty for a library.
    files: more files for the engine, name -> text.
    """

    commands: tuple[tuple[str, ...], ...]
    url: str = ""
    model: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The commands as a shell takes them."""
        return [shlex.join(command) for command in self.commands]

    @property
    def script(self) -> str:
        """A shell script that starts the engine, wherever the folder lies."""
        return "\n".join(["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"', *self.lines, ""])


@dataclass(frozen=True)
class Exported:
    """What a launch needs to know. num_labels: of a classifier, else 0. parts: files written."""

    name: str
    base: str
    rank: int = 0
    merged: bool = False
    num_labels: int = 0
    with_base: bool = True


def plan_launch(
    engine: Engine, exported: Exported, tokenizer: PreTrainedTokenizerBase | None = None
) -> Launch:
    """The launch of an export. tokenizer: the base's, for Ollama's template."""
    if engine.name == "vllm":
        return _vllm(engine, exported)
    if engine.name == "sglang":
        return _sglang(exported)
    if engine.name == "llama.cpp":
        return _llama_cpp(exported)
    if engine.name == "ollama":
        return _ollama(exported, tokenizer)
    return Launch((), notes=(_python(exported),))


def _vllm(engine: Engine, exported: Exported) -> Launch:
    classifier: tuple[str, ...] = ()
    if exported.num_labels:
        classifier = ("--runner", "pooling")
    if exported.merged:
        command = ("vllm", "serve", "model", "--served-model-name", exported.name, *classifier)
        return Launch((command,), "http://localhost:8000", exported.name)
    if classifier:  # the base has no head of its own: config/model.py, config/lora.py
        labels = str(exported.num_labels)
        classifier += ("--convert", "classify", "--max-lora-cls-labels", labels)
    command = (
        *("vllm", "serve", exported.base, *classifier),
        *("--enable-lora", "--max-lora-rank", str(engine.rank_limit(exported.rank))),
        *("--lora-modules", f"{exported.name}=adapter"),
    )
    notes = ("vLLM keeps caches by name and path: give a new version a new folder and name.",)
    return Launch((command,), "http://localhost:8000", exported.name, notes=notes)


def _sglang(exported: Exported) -> Launch:
    start = ("python", "-m", "sglang.launch_server", "--port", "30000")
    url = "http://localhost:30000"
    if exported.merged:
        command = (*start, "--model-path", "model", "--served-model-name", exported.name)
        return Launch((command,), url, exported.name)
    command = (
        *(*start, "--model-path", exported.base, "--served-model-name", "base", "--enable-lora"),
        *("--lora-paths", f"{exported.name}=adapter", "--max-lora-rank", str(exported.rank)),
        "--lora-strict-loading",
    )
    # serving_base.py: _parse_model_parameter finds an adapter after a colon only
    note = (
        f'SGLang applies the adapter to the model "base:{exported.name}"; asked for'
        f' "{exported.name}" alone it answers with the base.'
    )
    return Launch((command,), url, f"base:{exported.name}", notes=(note,))


def _llama_cpp(exported: Exported) -> Launch:
    url, alias = "http://localhost:8080", ("--alias", exported.name)
    if exported.merged:
        return Launch((("llama-server", "-m", "model.gguf", *alias),), url, exported.name)
    base = "base.gguf" if exported.with_base else "YOUR-BASE.gguf"
    command = ("llama-server", "-m", base, "--lora", "adapter.gguf", *alias)
    return Launch((command,), url, exported.name, notes=_own_base(exported))


def _ollama(exported: Exported, tokenizer: PreTrainedTokenizerBase | None) -> Launch:
    name = re.sub(r"[^a-z0-9._-]", "-", exported.name.lower())
    if exported.merged:
        lines = ["FROM ./model.gguf"]
    else:
        base = "./base.gguf" if exported.with_base else "./YOUR-BASE.gguf"
        lines = [f"FROM {base}", "ADAPTER ./adapter.gguf"]
    chat = None if tokenizer is None else chat_format(tokenizer)
    notes = _own_base(exported)
    if chat is not None:
        lines += chat
    else:
        notes += ("The base's chat template is none known here: Ollama takes it from the GGUF.",)
    commands = (("ollama", "create", name, "-f", "Modelfile"), ("ollama", "run", name))
    return Launch(
        commands, "http://localhost:11434", name, {"Modelfile": "\n".join([*lines, ""])}, notes
    )


def _own_base(exported: Exported) -> tuple[str, ...]:
    if exported.with_base or exported.merged:
        return ()
    return ("Put your own GGUF file of the base in place of YOUR-BASE.gguf.",)


def _python(exported: Exported) -> str:
    if exported.merged:
        return 'In Python: transformers.AutoModel.from_pretrained("model")'
    return 'In Python: peft.PeftModel.from_pretrained(base_model, "adapter")'


@dataclass(frozen=True)
class _Chat:
    """A family of chat templates: what stands before a message and after it, and where to stop."""

    before: str
    after: str
    stop: str

    def turn(self, role: str, content: str) -> str:
        return self.before.format(role=role) + content + self.after


_CHATS = (
    _Chat("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>"),
    _Chat("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
)
_SYSTEM, _USER = "You are terse.", "What is a route?"


def chat_format(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Lines of a Modelfile that make Ollama prompt as the tokenizer's chat template does.

    The template's family is found by what it renders. None where it is none of those known.
    """
    if not isinstance(tokenizer.chat_template, str):
        return None
    system = {"role": "system", "content": _SYSTEM}
    user = {"role": "user", "content": _USER}
    try:
        full, bare = _rendered(tokenizer, [system, user]), _rendered(tokenizer, [user])
    except Exception:
        return None
    for chat in _CHATS:
        turns = [
            chat.before.format(role=m["role"]) + m["content"] + chat.after for m in (system, user)
        ]
        opening = chat.before.format(role="assistant")
        if full != "".join(turns) + opening:
            continue
        rest = turns[1] + opening
        default = bare.removesuffix(rest)
        start = chat.before.format(role="system")
        lines = [_template(chat), f'PARAMETER stop "{chat.stop}"']
        if bare.endswith(rest) and default.startswith(start):
            words = default.removeprefix(start).removesuffix(chat.after)
            lines.append(f'SYSTEM """{words}"""')
        return lines
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The prompt without the token of the beginning, which engines put there themselves."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if isinstance(bos, str) and not _opens(bos) else text


def _opens(token: str) -> bool:
    """Whether the token opens every message, so that the first one is not the beginning's."""
    return any(chat.before.startswith(token) for chat in _CHATS)


def _template(chat: _Chat) -> str:
    before = chat.before.format(role="{{ .Role }}")
    opening = chat.before.format(role="assistant")
    return (
        f'TEMPLATE """{{{{- range .Messages }}}}{before}{{{{ .Content }}}}{chat.after}'
        f'{{{{ end }}}}{opening}"""'
    )
