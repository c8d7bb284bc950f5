"""What would make a step smaller, by how much, and at what price."""

from collections.abc import Iterator
from dataclasses import dataclass

from loralab.config import RunConfig, toml_value
from loralab.errors import LoralabError
from loralab.planning.plan import Plan, Planner

STATES = "optimiser states"


@dataclass(frozen=True)
class Lever:
    """One change of settings: what it saves at the peak, and what it costs, in words.

    settings: the overrides that pull it; empty where another tool is needed.
    """

    name: str
    saves_bytes: int
    cost: str
    settings: tuple[str, ...] = ()


def levers(planner: Planner, plan: Plan) -> list[Lever]:
    """Every lever that saves anything, largest first. Each is a plan of its own, not a formula,
    but for 8-bit states, which take a quarter of the bytes.
    """
    plan = planner.plan(plan.config, quick=True)  # like is compared with like
    if plan.estimated:
        return []
    found = [*_by_settings(planner, plan), *_eight_bit_states(plan)]
    if plan.step == "peft":
        found += _own_step(planner, plan)
    helpful = [lever for lever in found if lever.saves_bytes > 0]
    return sorted(helpful, key=lambda lever: -lever.saves_bytes)


def _by_settings(planner: Planner, plan: Plan) -> Iterator[Lever]:
    for name, changes, cost in _changes(plan.config, planner.attention_layers(plan.config)):
        try:
            changed = planner.plan(plan.config.replace(**changes), quick=True)
        except LoralabError:  # a model that cannot do it has no such lever
            continue
        settings = tuple(f"{k.replace('__', '.')}={toml_value(v)}" for k, v in changes.items())
        price = cost or recomputation(plan, changed)
        yield Lever(name, plan.peak_bytes - changed.peak_bytes, price, settings)


def _changes(
    config: RunConfig, attention: list[str]
) -> Iterator[tuple[str, dict[str, object], str]]:
    """(name, changed settings, cost; empty where the plan itself tells it)."""
    model, data, method, training = config.model, config.data, config.method, config.training
    if not training.activation_checkpointing:
        yield "activation checkpointing", {"training__activation_checkpointing": True}, ""
    if training.batch_size > 1:
        half = training.batch_size // 2
        pieces = -(-training.batch_size * training.accumulation // half)
        yield (
            "half the batch, accumulated",
            {"training__batch_size": half, "training__accumulation": pieces},
            "the same gradients from smaller pieces; slower where the device is not kept busy",
        )
    if data.max_tokens > 1:
        yield (
            "half the length",
            {"data__max_tokens": data.max_tokens // 2},
            "longer rows are cut",
        )
    if model.dtype == "float32":
        yield (
            "bfloat16",
            {"model__dtype": "bfloat16"},
            "8 significant bits in weights and activations; trained values keep fp32 masters",
        )
    if method.kind == "lora" and method.dropout:
        yield (
            "no adapter dropout",
            {"method__dropout": 0.0},
            "less regularisation",
        )
    if method.kind == "lora" and method.targets == "all-linear" and attention:
        yield (
            "adapters on attention alone",
            {"method__targets": attention},
            "less capacity: attention-only adapters learn less at equal parameters",
        )
    if not training.fused:
        yield "fused optimiser", {"training__fused": True}, "none known: it is also faster"


def recomputation(plan: Plan, changed: Plan) -> str:
    """The price of recomputing, from both plans."""
    more = changed.accounts.flops / plan.accounts.flops - 1
    return f"{100 * more:.0f} % more matrix work: blocks run forward again in the backward pass"


def _eight_bit_states(plan: Plan) -> Iterator[Lever]:
    held = plan.parts.get(STATES, 0)
    if held:
        yield Lever(
            "8-bit optimiser states",
            held * 3 // 4,
            "quantised moments; needs an 8-bit optimiser such as bitsandbytes' (not in loralab)",
        )


def _own_step(planner: Planner, plan: Plan) -> list[Lever]:
    own = Planner(planner.device, "own", planner.model).plan(plan.config, quick=True)
    saved = plan.peak_bytes - own.peak_bytes
    return [Lever("loralab's own step", saved, "none: the same mathematics, less kept")]
