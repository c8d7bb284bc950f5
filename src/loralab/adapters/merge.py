"""Merging: a function that gives a new plain model and a certificate.

`merge` never touches the model it is given.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.certificate import (
    LIMIT,
    MergeCertificate,
    check_limit,
    content_sha256,
    effect_facts,
)
from loralab.adapters.effect import Effect, ProbeInput, batches_of, measure_effect, runner
from loralab.adapters.extracting import collect
from loralab.adapters.frozen_norms import thaw_norms
from loralab.adapters.hosting import Adapted, Bank, Host, dismiss, host_of, plain_tensors
from loralab.adapters.installing import remove_hooks
from loralab.adapters.merge_faults import check_weights
from loralab.adapters.merging import (
    WeightError,
    change_at,
    check_mergeable,
    matrix_view,
    merged_weight,
    weight_error,
    weight_name,
)
from loralab.adapters.peft_format import content_hash
from loralab.adapters.targets import walk
from loralab.adapters.tying import can_be_declared_untied, tied_tables
from loralab.adapters.using import merged_name, use
from loralab.errors import AdapterError
from loralab.files import replacing, write_json, write_text

CERTIFICATE_FILE = "merge_certificate.json"


def merge(
    model: nn.Module,
    name: str,
    probes: Sequence[ProbeInput] | None = None,
    *,
    limit: float | None = None,
    force: bool = False,
) -> tuple[nn.Module, MergeCertificate]:
    """A new plain model with the adapter in its weights, and what that cost.

    Each weight is `W + delta` in fp32, rounded once to the base's dtype; tensors that the adapter
    does not change are shared with `model`, which stays as it is. A weight tied to another is
    untied where the adapter changes one side only.

    probes: `Probe`s, texts, or model inputs (a mapping of keywords, a tuple, a tensor) on which the
        logits are compared with the adapter applied in fp32; for a base in 16 bit this needs a
        copy of the model in fp32 while it lasts. None: those stored with the adapter, if any.
    limit: the share of the adapter's effect that may be lost (default 0.5), by the logits where
        probes are given, else by the weights. Above it `AdapterError` is raised unless `force`.
    """
    check_not_merged(model)
    adapter = collect(model, name, Tensor.detach)
    merged = merged_model(model, adapter)
    effect = None
    if probes is None and adapter.probes:
        probes = adapter.probes
    if probes is not None:
        effect = _measure(model, name, adapter, merged, batches_of(model, probes))
    certificate = certify(model, merged, adapter, effect, limit=limit, force=force)
    check_limit(certificate, name)
    return merged, certificate


def merged_model(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The plain model with the adapter added; tensors it does not change are shared."""
    twin = plain_twin(model)
    put_all(twin, changed_tensors(model, adapter))
    _declare_untied(twin)
    return twin


def certify(
    model: nn.Module,
    merged: nn.Module,
    adapter: Adapter,
    effect: Effect | None = None,
    *,
    limit: float | None = None,
    force: bool = False,
) -> MergeCertificate:
    """Measures a merged model against the base that hosts or hosted the adapter."""
    found, dtypes = WeightError(), set()
    old, new = plain_tensors(model), plain_tensors(merged)
    for module, path, name in _weights(model, adapter):
        change = change_at(adapter, path, old[name].device)
        base, result = old[name].detach(), new[name].detach()
        found += weight_error(
            matrix_view(module, base, base), matrix_view(module, result, base), change
        )
        dtypes.add(str(base.dtype).removeprefix("torch."))
    wanted = LIMIT if limit is None else limit
    lost = found.relative if effect is None else 1 - effect.kept(effect.kl_merged)
    return MergeCertificate(
        dtype="+".join(sorted(dtypes)) or "none",
        relative_error=found.relative,
        unchanged_share=found.unchanged_share,
        num_weights=found.num_weights,
        base_sha256=content_sha256(old),
        adapter_sha256=content_hash(adapter),
        limit=wanted,
        forced=force and lost > wanted,
        **effect_facts(effect),
    )


def changed_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Full name -> new tensor, in the base's dtype, of everything that the adapter changes."""
    check_mergeable(adapter)
    own = plain_tensors(model)
    check_weights(_weights(model, adapter), own)
    replaced: dict[str, Tensor] = {}
    for module, path, name in _weights(model, adapter):
        weight = own[name].detach()
        replaced[name] = merged_weight(module, weight, change_at(adapter, path, weight.device))
    modules = dict(walk(model)) if adapter.token_rows else {}
    for path, (rows, values) in adapter.token_rows.items():
        table = own[f"{path}.weight"].detach().clone()
        table[rows.to(table.device)] = values.to(table)
        for side in (path, *tied_tables(modules, path)):  # one tensor, so that they stay tied
            replaced[f"{side}.weight"] = table
    for name, tensor in adapter.extra.items():
        replaced[name] = tensor.detach().to(device=own[name].device, dtype=own[name].dtype)
    return replaced


def save_merged(
    merged: nn.Module,
    certificate: MergeCertificate,
    folder: str | Path,
    tokenizer: Any = None,
) -> None:
    """A transformers folder: weights, config, tokenizer, model card and the certificate.

    Raises `AdapterError` for a model that is none of transformers', `OutputError` for the disk.
    """
    save = getattr(merged, "save_pretrained", None)
    if save is None:
        raise AdapterError(
            f"a {type(merged).__name__} cannot be saved as a transformers folder",
            "save its `state_dict()` with safetensors.",
        )
    with replacing(Path(folder)) as aside:
        aside.mkdir()
        save(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        write_json(aside / CERTIFICATE_FILE, certificate.to_dict())
        write_text(aside / "README.md", model_card(certificate))


def model_card(certificate: MergeCertificate) -> str:
    """The README of a merged folder: what it is made of and what the merge cost."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [lora, merged]",
        "---",
        "# A merged model",
        "",
        "A base model with a low-rank adapter added to its weights: fp32 sums, one rounding.",
        "",
        f"- base (SHA-256 of its tensors): `{certificate.base_sha256}`",
        f"- adapter (SHA-256 of its contents): `{certificate.adapter_sha256}`",
        f"- dtype: {certificate.dtype}",
        f"- rounding error over the norm of the change: {certificate.relative_error:.3g}",
        f"- adapted weights that the rounding left unchanged: {certificate.unchanged_share:.1%}",
    ]
    if certificate.effect_kept is not None:
        lines += [
            f"- effect kept on {certificate.num_positions} probe positions:"
            f" {certificate.effect_kept:.1%} (KL {certificate.logit_kl:.3g} nats, top-1"
            f" agreement {certificate.top1_agreement:.1%})"
        ]
    return "\n".join(lines) + "\n"


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of the modules without adapters, whose tensors are the model's own memory."""
    host = host_of(model)
    thawed = host.thawed if host is not None else set()
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        frozen = name not in thawed if host is not None else not parameter.requires_grad
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=not frozen)
    shared.update({id(buffer): buffer for buffer in model.buffers()})
    for module in model.modules():
        if isinstance(module, Adapted):
            shared[id(module.adapters)] = Bank(Host(), "")
    merged = model.__dict__.get("_loralab_merged")
    shared.update({id(state): None for state in (host, merged) if state is not None})
    twin = copy.deepcopy(model, shared)
    twin.__dict__.pop("_loralab_host", None)
    twin.__dict__.pop("_loralab_merged", None)
    for module in list(twin.modules()):
        dismiss(module)
    remove_hooks(twin)
    thaw_norms(twin)
    return twin


def check_not_merged(model: nn.Module) -> None:
    if merged_name(model) is not None:
        raise AdapterError(
            f"adapter {merged_name(model)!r} is merged into this model already",
            "call `loralab.restore(model)` first.",
        )


def _weights(model: nn.Module, adapter: Adapter) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, its path, the full name of its weight) for each pair of the adapter."""
    for path in adapter.pairs:
        module = model.get_submodule(path)
        name = weight_name(module)
        yield module, path, f"{path}.{name}" if path else name


def put_all(model: nn.Module, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces parameters and buffers, and gives back those that were there.

    The modules' entries are replaced, not the parameters' data: what is tied to a replaced
    parameter keeps the base's values. Entries given the same tensor become tied.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    parameters: dict[int, nn.Parameter] = {}
    kept: dict[str, Tensor] = {}
    for full_name, tensor in changed.items():
        path, _, key = full_name.rpartition(".")
        table = table_of(owners[path], key)
        kept[full_name] = old = table[key]
        if isinstance(old, nn.Parameter):
            made = nn.Parameter(tensor, requires_grad=old.requires_grad)
            table[key] = parameters.setdefault(id(tensor), made)
        else:
            table[key] = tensor
    return kept


def table_of(owner: nn.Module, key: str) -> dict[str, Any]:
    return owner._parameters if key in owner._parameters else owner._buffers


def _declare_untied(twin: nn.Module) -> None:
    """Tells transformers that a tie is cut, so that saving and loading keep both sides."""
    if not can_be_declared_untied(twin):
        return
    tied = getattr(twin, "_tied_weights_keys", None)
    own = plain_tensors(twin)
    pairs = tied.items() if isinstance(tied, dict) else ()
    if any(a in own and b in own and own[a] is not own[b] for a, b in pairs):
        cast(Any, twin).config.tie_word_embeddings = False


def _measure(
    model: nn.Module, name: str, adapter: Adapter, merged: nn.Module, batches: list[Any]
) -> Effect:
    """The effect on probes; models are put in evaluation mode meanwhile and back afterwards."""
    exact = all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    merged_was_training, _ = merged.training, merged.eval()

    def separate(batch: Any) -> Any:
        with use(model, name):
            return runner(model)(batch)

    def alone(batch: Any) -> Any:
        with use(model, None):
            return runner(model)(batch)

    try:
        with torch.no_grad():
            if exact:
                return measure_effect(separate, runner(merged), separate, alone, batches)
            base = plain_twin(model).float().eval()
            reference = merged_model(base, adapter).eval()
            return measure_effect(
                _in_fp32(reference), runner(merged), separate, _in_fp32(base), batches
            )
    finally:
        for module, training in was_training:
            module.training = training
        merged.train(merged_was_training)


def _in_fp32(model: nn.Module) -> Any:
    """Runs a model on a batch whose 16-bit inputs are widened first."""

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: widened(item) for key, item in value.items()}
        return tuple(map(widened, value)) if isinstance(value, tuple | list) else value

    return lambda batch: runner(model)(widened(batch))
