"""Which modules a config means: names, suffixes, regular expressions, "all-linear"."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from loralab.adapters.layers import is_linear, path_of
from loralab.adapters.peft_names import is_inner
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.tying import tied_tables
from loralab.errors import TargetError

ADAPTERS = "adapters"  # the child that holds a module's adapters
HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "classification_head", "qa_outputs"})


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base: adapters are not entered, so that it costs the same with any
    number of them. A module under two names is given once, under the first."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None and key != ADAPTERS:
                stack.append((prefix + key, child))


def output_head(model: nn.Module) -> set[str]:
    """Names of the modules that make the model's output; "all-linear" leaves them out."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    fresh = getattr(model, "_loralab_fresh_head", None)
    return {
        name
        for name, module in walk(model)
        if name and (module is output or name == fresh or name.rpartition(".")[2] in HEAD_NAMES)
    }


def select(model: nn.Module, config: LoRAConfig) -> tuple[list[str], list[str]]:
    """(modules that get a pair, modules trained whole), in the model's order.

    Raises `TargetError` that lists every target, exclusion and whole module that matches nothing,
    each with the nearest module name.
    """
    modules = {name: module for name, module in walk(model) if name}
    faults: list[str] = []
    whole = _by_suffix(config.whole_modules, modules, "whole module", faults)
    faults += [_never_called(name, modules[name]) for name in whole if _is_list(modules[name])]
    excluded = _excluded(config, modules, faults)
    chosen = [
        name
        for name in _targeted(model, config, modules, faults)
        if name not in excluded and not any(_within(name, owner) for owner in whole)
    ]
    chosen = _with_projections(chosen, modules)
    faults += _separate_attention(config, modules, {*excluded, *whole})
    if config.layers is not None:
        chosen = _in_layers(chosen, config.layers, faults)
    if faults:
        raise TargetError(
            "\n  - ".join([f"{len(faults)} fault{'s' if len(faults) > 1 else ''}", *faults]),
            "`loralab.targets(model)` shows every module with what an adapter on it costs.",
        )
    outermost = [name for name in whole if not any(_within(name, o) for o in whole if o != name)]
    return chosen, outermost


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _never_called(name: str, module: nn.Module) -> str:
    members = ", ".join(f"{name}.{key}" for key in list(module._modules)[:3])
    kind = type(module).__name__
    return f"whole module {name!r} is a {kind}, which is never called; name its members: {members}"


def missing_targets(
    modules: Mapping[str, nn.Module], config: LoRAConfig, pairs: Iterable[str]
) -> list[str]:
    """Modules that the config's own words target, but that have no pair."""
    if config.targets == "all-linear" or config.layers is not None:
        return []  # these words depend on the model they were first said of
    if isinstance(config.targets, str):
        expression = re.compile(config.targets)
        found = [name for name in modules if expression.fullmatch(name)]
    else:
        found = list(_by_suffix(config.targets, modules, "", []))
    excluded = {
        *pairs,
        *_excluded(config, modules, []),
        *(n for n in found if any(n.endswith(w) or f"{w}." in n for w in config.whole_modules)),
    }
    return [n for n in found if n not in excluded and path_of(modules[n]) is not None]


def _targeted(
    model: nn.Module, config: LoRAConfig, modules: Mapping[str, nn.Module], faults: list[str]
) -> list[str]:
    if config.targets == "all-linear":
        heads = output_head(model)
        found = [
            name
            for name, module in modules.items()
            if is_linear(module) and not any(_within(name, head) for head in heads)
        ]
        if not found:
            faults.append(f"target 'all-linear': {_no_linear(model, modules)}")
        return found
    if isinstance(config.targets, str):
        return _by_expression(config.targets, modules, faults)
    found = _by_suffix(config.targets, modules, "target", faults)
    faults.extend(_no_path(name, modules) for name in found if path_of(modules[name]) is None)
    return list(found)


def _no_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    if path_of(model) is not None:
        return f"the model is itself a {type(model).__name__}; put it into nn.Sequential"
    others = sorted({type(m).__name__ for m in modules.values() if path_of(m) is not None})
    named = f"; of {', '.join(others)} give the names" if others else ""
    return f"the model has no linear layer but its head{named}"


def _with_projections(names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """An attention module with packed projections brings its output projection along."""
    found = dict.fromkeys(names)
    for name in names:
        if isinstance(modules[name], nn.MultiheadAttention):
            found[f"{name}.out_proj"] = None
    return [name for name in modules if name in found]


def _by_expression(
    expression: str, modules: Mapping[str, nn.Module], faults: list[str]
) -> list[str]:
    adaptable = {name: module for name, module in modules.items() if path_of(module) is not None}
    found = [name for name in adaptable if re.fullmatch(expression, name)]
    if not found:
        hint = _nearest_module(expression, adaptable)
        if _by_suffix((expression,), modules, "", []):
            hint = f"a string must match the whole name; for a suffix write [{expression!r}]"
        faults.append(f"target {expression!r} (a regular expression) matches no module; {hint}")
    return found


def _excluded(
    config: LoRAConfig, modules: Mapping[str, nn.Module], faults: list[str]
) -> dict[str, None]:
    if not isinstance(config.exclude, str):
        return _by_suffix(config.exclude, modules, "exclusion", faults)
    found = {name: None for name in modules if re.fullmatch(config.exclude, name)}
    if not found:
        faults.append(f"exclusion {config.exclude!r} (a regular expression) matches no module")
    return found


def excluding(config: LoRAConfig, names: Sequence[str]) -> LoRAConfig:
    """The settings with these modules (full names) left out, too."""
    if not isinstance(config.exclude, str):
        return replace(config, exclude=(*config.exclude, *names))
    return replace(config, exclude="|".join([f"(?:{config.exclude})", *map(re.escape, names)]))


def _by_suffix(
    suffixes: Sequence[str], modules: Mapping[str, nn.Module], what: str, faults: list[str]
) -> dict[str, None]:
    found: dict[str, None] = {}
    endings, unused = set(suffixes), set(suffixes)
    lengths = {suffix.count(".") for suffix in suffixes}
    for name in modules:
        for length in lengths:
            ending = ".".join(name.rsplit(".", length + 1)[-length - 1 :])
            if ending in endings:
                found[name] = None
                unused.discard(ending)
    faults.extend(
        f"{what} {suffix!r} matches no module; {_nearest_module(suffix, modules)}"
        for suffix in suffixes
        if suffix in unused
    )
    return found


def _nearest_module(word: str, modules: Mapping[str, nn.Module]) -> str:
    known = {name.rpartition(".")[2] for name in modules} | set(modules)
    known = {name for name in known if not name.isdigit()} or known
    close = get_close_matches(word, sorted(known), n=1, cutoff=0.0)
    return f"the nearest is {close[0]!r}" if close else "the model has no submodules"


def no_low_rank_form(module: nn.Module) -> str:
    """Why `path_of` knows none for this module: what follows its name in a message."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "has separate weights for query, key and value, as their sizes differ (kdim, vdim):"
            " these have no low-rank form"
        )
    return f"is a {type(module).__name__}, which has no low-rank form"


def packed_faults(
    config: LoRAConfig, modules: Mapping[str, nn.Module], paths: Iterable[str]
) -> list[str]:
    """What an adapter with these settings on these modules would ask of packed attention in vain.

    Its projections are weights that nothing is called with: there is no input to drop, and DoRA
    would need the norms of each projection's weight in every forward.
    """
    if not (config.dropout or config.dora):
        return []
    return [
        f"{path} takes neither dropout nor DoRA: its projections are weights without a module"
        for path in paths
        if isinstance(modules.get(path), nn.MultiheadAttention)
    ]


def follow_attention(config: LoRAConfig, paths: Sequence[str]) -> LoRAConfig:
    """The settings with an attention's rank and alpha for its output projection, too.

    Patterns that name the projection itself decide before.
    """
    owners = {path: path.removesuffix(".out_proj") for path in paths if is_inner(path, paths)}
    ranks: dict[str, int] = {}
    alphas: dict[str, float | int] = {}
    for path, owner in owners.items():
        key = "^" + path.replace(".", r"\.")
        ranks[key] = config.rank_at(path, config.rank_at(owner))
        alphas[key] = config.alpha_at(path, config.alpha_at(owner))
    ranks = {key: rank for key, rank in ranks.items() if rank != config.rank}
    alphas = {key: alpha for key, alpha in alphas.items() if alpha != config.alpha}
    if not ranks and not alphas:
        return config
    return replace(
        config,
        rank_pattern=ranks | dict(config.rank_pattern),
        alpha_pattern=alphas | dict(config.alpha_pattern),
    )


def row_conflicts(
    modules: Mapping[str, nn.Module], tables: Iterable[str], taken: Container[str]
) -> list[str]:
    """Embeddings whose rows the adapter replaces although it changes them, or a tied weight, else.

    A tied weight gets the rows, too.
    """
    faults = []
    for path in tables:
        for other in [path, *tied_tables(modules, path)] if path in modules else ():
            owners = [other] + [other.rsplit(".", n)[0] for n in range(1, other.count(".") + 1)]
            if any(owner in taken for owner in owners):
                of = path if other == path else f"{path}, to which {other} is tied,"
                faults.append(f"token_rows of {of} meet another change of the same weight: {other}")
    return faults


def _separate_attention(
    config: LoRAConfig, modules: Mapping[str, nn.Module], left_out: Container[str]
) -> list[str]:
    """Attention that the targets mean as a whole, although it has no packed projection."""
    if not isinstance(config.targets, str):
        return []  # a suffix that names it is a fault already
    return [
        f"target {config.targets!r} means {name!r} too, which {no_low_rank_form(module)};"
        f" leave it out with exclude=[{name!r}]"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        and path_of(module) is None
        and name not in left_out
        and (config.targets == "all-linear" or re.fullmatch(config.targets, name))
    ]


def _no_path(name: str, modules: Mapping[str, nn.Module]) -> str:
    inner = [n for n, m in modules.items() if _within(n, name) and path_of(m) is not None]
    cause = f"target {name!r} {no_low_rank_form(modules[name])}"
    return f"{cause}; inside it: {', '.join(inner[:4])}" if inner else cause


def _in_layers(names: list[str], layers: Sequence[int], faults: list[str]) -> list[str]:
    """Those whose block number (the first number in the name) is asked for."""
    numbers = {name: next((int(p) for p in name.split(".") if p.isdigit()), None) for name in names}
    missing = sorted(set(layers) - {number for number in numbers.values() if number is not None})
    if missing:
        known = sorted({number for number in numbers.values() if number is not None})
        span = f"blocks {known[0]} to {known[-1]}" if known else "no numbered blocks"
        faults.append(f"layers {missing} match no module; the targets lie in {span}")
    return [name for name in names if numbers[name] in layers]


def _within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")
