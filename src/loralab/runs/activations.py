"""The hidden states of the same rows with and without an adapter."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from loralab.adapters import Adapter, install, use
from loralab.config import DataSection, RunConfig
from loralab.data import Encoded, collate, encode, evaluation_batches, load_dataset, load_rows
from loralab.evidence.xray import LayerDimension, layer_dimensions
from loralab.models import load_model, load_tokenizer, model_folder
from loralab.runs.evaluate import FILE_SUFFIXES
from loralab.runs.subject import is_of_language_model, task_of
from loralab.runs.workbench import base_model

NUM_ROWS, BATCH_SIZE, MAX_TOKENS = 400, 32, 128
AFTER = "after"


def activation_dimensions(
    base: str,
    tuned: str,
    adapter: Adapter | None,
    data: str,
    *,
    config: RunConfig | None = None,
    num_rows: int = NUM_ROWS,
) -> tuple[LayerDimension, ...]:
    """The dimension of every hidden state, averaged over each row's tokens, before and after.

    tuned: the checkpoint, where there is no adapter. config: of the run that trained it, where it
    is known; else the model's head is made to fit the adapter. Raises `DataError` for too few rows.
    """
    rows = _rows(base, data, num_rows)
    pad_id = int(load_tokenizer(base).pad_token_id)  # pyright: ignore[reportArgumentType]
    if adapter is None:
        before = _hidden_states(_plain(base), rows, pad_id, None)
        return layer_dimensions(before, _hidden_states(_plain(tuned), rows, pad_id, None))
    model = _fitting(base, adapter) if config is None else base_model(config)
    install(model, adapter, AFTER)
    model.eval()
    before = _hidden_states(model, rows, pad_id, None)
    return layer_dimensions(before, _hidden_states(model, rows, pad_id, AFTER))


def _rows(base: str, data: str, num_rows: int) -> list[Encoded]:
    if Path(data).suffix.lower() in FILE_SUFFIXES:
        section = DataSection(train=data)
        examples = load_rows(data, section, task="classification", num_labels=2)
    else:
        dataset = load_dataset(DataSection(name=data), task="classification", num_labels=2)
        examples = dataset.test or dataset.train
    tokenizer = load_tokenizer(base)
    return encode(examples[:num_rows], tokenizer, task="classification", max_tokens=MAX_TOKENS)


def _plain(name: str) -> nn.Module:
    """A checkpoint with any head: only its hidden states are looked at."""
    labels = AutoConfig.from_pretrained(model_folder(name), local_files_only=True).num_labels
    return load_model(name, num_labels=max(2, labels or 0)).eval()


def _fitting(name: str, adapter: Adapter) -> nn.Module:
    """The base with such a head as the adapter brings; any head where it brings none."""
    told = task_of(adapter)
    if told["task"] == "causal" and not is_of_language_model(adapter):
        return load_model(name)
    return load_model(name, **told)


@torch.inference_mode()
def _hidden_states(
    model: nn.Module, rows: list[Encoded], pad_id: int, route: str | None
) -> list[Float[Tensor, "rows width"]]:
    """Each hidden state (embeddings first), the mean over a row's tokens."""
    layers: list[list[Tensor]] = []
    with use(model, route) if route is not None else nullcontext():
        for states in _forward(model, rows, pad_id):
            layers = layers or [[] for _ in states]
            for kept, state in zip(layers, states, strict=True):
                kept.append(state)
    return [torch.cat(kept).clone() for kept in layers]


def _forward(model: nn.Module, rows: list[Encoded], pad_id: int) -> Iterator[list[Tensor]]:
    for indices in evaluation_batches([len(row.input_ids) for row in rows], BATCH_SIZE):
        batch = collate([rows[index] for index in indices], pad_id=pad_id)
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        )
        mask = batch.attention_mask[..., None].float()
        yield [(state.float() * mask).sum(1) / mask.sum(1) for state in output.hidden_states]
