"""`adapter_config.json`, PEFT's words for our settings, both ways."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from loralab.adapters.adapter import Adapter
from loralab.adapters.peft_names import is_inner
from loralab.adapters.settings import LoRAConfig
from loralab.errors import ConfigError

# keys that say nothing about what the tensors do
INERT = frozenset(
    """peft_type auto_mapping base_model_name_or_path revision task_type inference_mode peft_version
    r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules exclude_modules
    modules_to_save bias use_dora fan_in_fan_out init_lora_weights layers_to_transform
    layers_pattern trainable_token_indices loftq_config eva_config corda_config lora_ga_config
    runtime_config megatron_config megatron_core qalora_group_size
    """.split()  # noqa: SIM905  (a list of words reads better as words)
)
# initialisers that changed the base, so that the factors fit no untouched base
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ONLY_OURS = "LORALAB"  # the kind of an adapter that PEFT would apply otherwise than we do
REQUIRED = frozenset({"r", "lora_alpha"})  # present and null is a fault
BIASES = {"none": "none", "lora_only": "targets", "all": "all"}
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
KNOWN_TASKS = (*dict.fromkeys(TASK_TYPES.values()), "FEATURE_EXTRACTION")


def from_peft(raw: Any, faults: list[str]) -> LoRAConfig | None:
    """PEFT's settings as ours; what is wrong or not expressible is added to `faults` by name."""
    if not isinstance(raw, dict):
        faults.append(f"adapter_config.json holds a {type(raw).__name__}, not a table")
        return None
    before = len(faults)
    kind = raw.get("peft_type")
    if kind not in ("LORA", ONLY_OURS):
        faults.append(f"peft_type is {kind!r}; only LORA is known")
    faults.extend(
        f"{key} is {value!r}, which has no counterpart here"
        for key, value in raw.items()
        if key not in INERT and value not in (None, False, [], {}, "")
    )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(MOVES_THE_BASE):
        faults.append(
            f"init_lora_weights is {init!r}, which changed the base; save it from PEFT with"
            " path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    _check_types(raw, faults)
    if len(faults) > before:
        return None
    try:
        return LoRAConfig(
            rank=raw.get("r", 8),
            alpha=float(raw.get("lora_alpha", 8)),
            targets=raw.get("target_modules") or (),
            exclude=raw.get("exclude_modules") or (),
            dropout=float(raw.get("lora_dropout") or 0.0),
            scaling="alpha/sqrt(rank)" if raw.get("use_rslora") else "alpha/rank",
            whole_modules=raw.get("modules_to_save") or (),
            layers=_numbers(raw.get("layers_to_transform")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            token_rows=_token_rows(raw.get("trainable_token_indices")),
            biases=BIASES[raw.get("bias") or "none"],
            dora=bool(raw.get("use_dora")),
        )
    except ConfigError as error:
        faults.append(error.cause)
        return None


def to_peft(adapter: Adapter, *, portable: bool = True) -> dict[str, Any]:
    """Our settings as PEFT writes them, such that PEFT builds exactly this adapter's modules.

    portable: False names a kind of adapter that PEFT does not know, so that it refuses the folder.
    """
    config = adapter.config
    ranks: dict[str, int] = {}
    alphas: dict[str, float | int] = {}
    for name, (A, _) in adapter.pairs.items():
        if is_inner(name, adapter.pairs):
            continue  # PEFT gives it its attention's
        layer = adapter.layer(name)
        more = layer.base_groups // layer.groups  # PEFT's A has a block for each group
        ranks[name] = more * A.shape[0]
        growth = more if config.scaling == "alpha/rank" else math.sqrt(more)  # the scale stays
        alphas[name] = growth * config.alpha_at(name) if more > 1 else config.alpha_at(name)
    rank, rank_pattern = _with_exceptions(ranks, config.rank)
    alpha, alpha_pattern = _with_exceptions(alphas, config.alpha)
    return {
        "peft_type": "LORA" if portable else ONLY_OURS,
        "task_type": _task_type(adapter),
        "auto_mapping": None,
        "base_model_name_or_path": adapter.facts.get("base_model"),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "alpha/sqrt(rank)",
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules(adapter),
        "exclude_modules": None,
        "modules_to_save": list(adapter.whole_modules) or None,
        "bias": {ours: theirs for theirs, ours in BIASES.items()}[config.biases],
        "use_dora": config.dora,
        "fan_in_fan_out": adapter.facts.get("fan_in_fan_out") == "true",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": {
            name: indices.tolist() for name, (indices, _) in adapter.token_rows.items()
        }
        or None,
    }


def target_modules(adapter: Adapter) -> list[str] | str:
    """The shortest list of suffixes that means exactly the adapter's modules, else an expression.

    PEFT matches every module of the model against suffixes; `facts["modules"]` lists the last
    parts of names that occur outside the adapter too and so are of no use.
    """
    # PEFT adapts an attention's output projection together with the attention
    inner = {f"{path}.out_proj" for path in adapter.pairs}
    paths = sorted(path for path in adapter.pairs if path not in inner)
    avoid = set(adapter.facts.get("ambiguous", "").split())
    suffixes = sorted({path.rpartition(".")[2] for path in paths})
    if "model_class" in adapter.facts and not avoid.intersection(suffixes):
        return suffixes
    collide = any(p != q and p.endswith("." + q) for p in paths for q in paths if len(q) < len(p))
    if len(paths) == 1 or not collide:
        return paths
    return "|".join(path.replace(".", r"\.") for path in paths)


def _task_type(adapter: Adapter) -> str | None:
    """PEFT adds a head to train for these tasks; so none is named where the head is not ours."""
    name = adapter.facts.get("model_class", "")
    task = next((task for ending, task in TASK_TYPES.items() if name.endswith(ending)), None)
    task = adapter.facts.get("task_type", task)
    if task == "SEQ_2_SEQ_LM" and adapter.facts.get("sequence_to_sequence") == "false":
        return None  # speech and pictures in: PEFT's class for text hands over other inputs
    has_head = any(w.rpartition(".")[2] in ("score", "classifier") for w in adapter.whole_modules)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not has_head:
        return None
    return None if task == "QUESTION_ANS" and "qa_outputs" not in adapter.whole_modules else task


def _with_exceptions(values: Mapping[str, Any], usual: Any) -> tuple[Any, dict[str, Any]]:
    """The usual value and the modules (full names, as anchored expressions) that differ."""
    found = set(values.values())
    if len(found) == 1:
        usual = found.pop()
    anchored = {
        "^" + name.replace(".", r"\."): value for name, value in values.items() if value != usual
    }
    return usual, anchored


def _check_types(raw: Mapping[str, Any], faults: list[str]) -> None:
    """Names every value of the wrong kind, so that nothing later stumbles over it."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (_is_whole, "a whole number"),
        "lora_alpha": (_is_number, "a finite number"),
        "lora_dropout": (_is_number, "a finite number"),
        "use_rslora": (_is_flag, "true or false"),
        "use_dora": (_is_flag, "true or false"),
        "fan_in_fan_out": (_is_flag, "true or false"),
        "target_modules": (_is_names, "a string or a list of strings"),
        "exclude_modules": (_is_names, "a string or a list of strings"),
        "modules_to_save": (_is_names, "a string or a list of strings"),
        "rank_pattern": (lambda value: _is_table(value, _is_whole), "a table of whole numbers"),
        "alpha_pattern": (lambda value: _is_table(value, _is_number), "a table of numbers"),
        "layers_to_transform": (_is_indices, "a list of whole numbers"),
        "trainable_token_indices": (
            lambda value: _is_indices(value) or _is_table(value, _is_indices),
            "a list of row numbers or a table of such lists",
        ),
        "bias": (lambda value: value in BIASES, f"one of {', '.join(BIASES)}"),
        "task_type": (lambda value: value in KNOWN_TASKS, f"one of {', '.join(KNOWN_TASKS)}"),
        "base_model_name_or_path": (lambda value: isinstance(value, str), "a string"),
        "init_lora_weights": (lambda value: isinstance(value, bool | str), "a flag or a word"),
    }
    faults.extend(
        f"{key} is {raw[key]!r}, not {wanted}"
        for key, (fits, wanted) in kinds.items()
        if key in raw and not (raw[key] is None and key not in REQUIRED) and not fits(raw[key])
    )
    _check_paths(raw, faults)


def _check_paths(raw: Mapping[str, Any], faults: list[str]) -> None:
    """Names every path that leads out of the folder, and every name of a module that is a path.

    A base may be a folder of this machine: then it is there.
    """
    base = raw.get("base_model_name_or_path")
    if isinstance(base, str):
        absolute = PurePosixPath(base).is_absolute() or PureWindowsPath(base).is_absolute()
        climbs = ".." in base.replace("\\", "/").split("/")
        if climbs or (absolute and not (Path(base) / "config.json").is_file()):
            faults.append(
                f"base_model_name_or_path holds {base!r}, a path out of its folder that is no model"
                " here; remove that entry"
            )
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = raw.get(key)
        faults.extend(
            f"{key} holds {name!r}, a path and no module's name"
            for name in (names if isinstance(names, list) else ())
            if isinstance(name, str) and ("/" in name or "\\" in name or ".." in name)
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value, str)


def _is_indices(value: Any) -> bool:
    return _is_whole(value) or (_is_list(value, int) and all(map(_is_whole, value)))


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _numbers(value: Any) -> list[int] | None:
    return None if value is None else _listed(value)


def _token_rows(value: Any) -> dict[str, list[int]]:
    if value is None:
        return {}
    table = value if isinstance(value, dict) else {"embed_tokens": value}
    return {module: _listed(rows) for module, rows in table.items()}
