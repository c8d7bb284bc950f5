"""What would make a step smaller, by how much, and at what price."""

from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(frozen=True)
class Change:
    """Settings that may make a step smaller.

    cost: in words; empty where the plan itself tells it. for_passes: whether it is one for runs
    in one pass, whose rows are encoded already and whose adapters may differ.
    """

    name: str
    settings: dict[str, object]
    cost: str = ""
    for_passes: bool = False

    def lever(self, plan: Plan, changed: Plan) -> Lever:
        """What it saves, from the plans without it and with it."""
        return Lever(
            self.name,
            plan.peak_bytes - changed.peak_bytes,
            self.cost or _recomputation(plan, changed),
            tuple(f"{k.replace('__', '.')}={toml_value(v)}" for k, v in self.settings.items()),
        )


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
    return helpful(found)


def helpful(found: Iterable[Lever]) -> list[Lever]:
    """Those that save anything, largest first."""
    saving = [lever for lever in found if lever.saves_bytes > 0]
    return sorted(saving, key=lambda lever: -lever.saves_bytes)


def changes(config: RunConfig, attention: Sequence[str] = ()) -> Iterator[Change]:
    """What these settings leave to be changed. attention: names of the attention's layers."""
    model, data, method, training = config.model, config.data, config.method, config.training
    if not training.activation_checkpointing:
        yield Change(
            "activation checkpointing",
            {"training__activation_checkpointing": True},
            for_passes=True,
        )
    if training.batch_size > 1:
        half = training.batch_size // 2
        pieces = -(-training.batch_size * training.accumulation // half)
        yield Change(
            "half the batch, accumulated",
            {"training__batch_size": half, "training__accumulation": pieces},
            "the same gradients from smaller pieces; slower where the device is not kept busy",
            for_passes=True,
        )
    if data.max_tokens > 1:
        yield Change(
            "half the length",
            {"data__max_tokens": data.max_tokens // 2},
            "longer rows are cut",
        )
    if model.dtype == "float32":
        yield Change(
            "bfloat16",
            {"model__dtype": "bfloat16"},
            "8 significant bits in weights and activations; trained values keep fp32 masters",
            for_passes=True,
        )
    if method.kind == "lora" and method.dropout:
        yield Change(
            "no adapter dropout",
            {"method__dropout": 0.0},
            "less regularisation",
        )
    if method.kind == "lora" and method.targets == "all-linear" and attention:
        yield Change(
            "adapters on attention alone",
            {"method__targets": list(attention)},
            "less capacity: attention-only adapters learn less at equal parameters",
        )
    if not training.fused:
        yield Change("fused optimiser", {"training__fused": True}, "none known: it is also faster")


def _by_settings(planner: Planner, plan: Plan) -> Iterator[Lever]:
    for change in changes(plan.config, planner.attention_layers(plan.config)):
        try:
            changed = planner.plan(plan.config.replace(**change.settings), quick=True)
        except LoralabError:  # a model that cannot do it has no such lever
            continue
        yield change.lever(plan, changed)


def _recomputation(plan: Plan, changed: Plan) -> str:
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
