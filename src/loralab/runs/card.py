"""The model card beside trained weights: what it is, how good, how it was made, how to use it."""

from typing import Any

from loralab.config import RunConfig
from loralab.runs.tables import evaluation_table

USE = {
    "adapter": """```python
import loralab

model = loralab.load_model({model_arguments})
loralab.load_adapter(model, "path/to/this/folder", name="it")
with loralab.use(model, "it"):
    ...
```

The files are in PEFT's format: `PeftModel.from_pretrained(model, folder)` reads them too, the
classification head included.""",
    "head": """```python
import loralab
from safetensors.torch import load_file

model = loralab.load_model({model_arguments})
model.load_state_dict(load_file("path/to/this/folder/head.safetensors"), strict=False)
```""",
    "model": """```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```""",
}


def model_card(
    config: RunConfig,
    *,
    kind: str,
    facts: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
) -> str:
    """Markdown with a metadata header, for `kind` "adapter", "model" or "head"."""
    return "\n".join(
        [
            *_header(config, kind),
            f"# {config.model.name}, fine-tuned on {_data_name(config)}",
            "",
            f"Method: **{config.method.kind}**. {_method_line(config, facts)}",
            "",
            "## Results",
            "",
            *_results(evaluations),
            "",
            "## Use",
            "",
            _usage(config, kind),
            "",
            "## How it was made",
            "",
            f"Data order `{str(facts.get('order_hash', ''))[:16]}`; complete settings:",
            "",
            "```toml",
            config.to_toml().strip(),
            "```",
            "",
        ]
    )


def _header(config: RunConfig, kind: str) -> list[str]:
    task = "text-classification" if config.model.task == "classification" else "text-generation"
    library = {"adapter": "peft", "model": "transformers", "head": "loralab"}[kind]
    return [
        "---",
        f"base_model: {config.model.name}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags:",
        "- loralab",
        *(["- lora"] if kind == "adapter" else []),
        "---",
        "",
    ]


def _data_name(config: RunConfig) -> str:
    return config.data.name or str(config.data.train)


def _method_line(config: RunConfig, facts: dict[str, Any]) -> str:
    trained = f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters"
    if config.method.kind != "lora":
        return f"Trained: {trained}."
    method, step = config.method, facts.get("effective_step")
    parts = [
        f"Rank {method.rank}, alpha {method.alpha:g}, scaling {method.scaling}",
        f"initialisation {method.init}",
        *(["DoRA"] if method.dora else []),
        f"targets {method.targets}",
    ]
    started = (
        f" Effective first step (scale * std(A) * learning rate): {step['effective_step']:.3g}."
        if step
        else ""
    )
    return f"{', '.join(parts)}.{started} Trained: {trained}."


def _results(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| split | rows | figure | value | 95 % interval |", "|---|---|---|---|---|"]
    for split, evaluation in evaluations.items():
        _, rows = evaluation_table({"split": split, **evaluation})
        lines += [f"| {split} | {evaluation['rows']} | {' | '.join(row)} |" for row in rows]
    return lines


def _usage(config: RunConfig, kind: str) -> str:
    model = config.model
    arguments = [f'"{model.name}"', f'task="{model.task}"']
    if model.task == "classification":
        arguments.append(f"num_labels={model.num_labels}")
    if model.dtype != "float32":
        arguments.append(f'dtype="{model.dtype}"')
    if model.head_bias:
        arguments.append("head_bias=True")
    if model.pooling != "native":
        arguments.append(f'pooling="{model.pooling}"')
    causal = model.task == "causal"
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    text = USE[kind].replace("{model_arguments}", ", ".join(arguments))
    return text.replace("{auto_class}", auto)
