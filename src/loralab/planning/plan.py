"""The plan of a training step: what it needs, whether that fits, what would make it smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loralab.adapters import collector_paused
from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.errors import UntraceableError
from loralab.placement import planned_for
from loralab.planning.accounts import Accounts, Stretch
from loralab.planning.blocks import Run, linear_layers
from loralab.planning.devices import Device
from loralab.planning.estimate import ESTIMATE_ERROR_BAR, estimate
from loralab.planning.predict import predict
from loralab.planning.steps import ModelSource, StepKind, Traceable, traceable

ERROR_BAR = 0.02
"""Relative: the worst that a traced plan has been off by (benchmarks/planning.py)."""

SAFETY_MARGIN = 0.01
"""Of the capacity, kept free on top of the error bar: fragments that the allocator cannot use."""


WHOLE_BLOCKS = 36
"""Models of so many blocks are traced whole in a few seconds."""

UNEVEN_SHARE = 0.002
"""Of the peak: what the allocator may leave unsplit before all blocks are traced."""


@dataclass(frozen=True)
class Plan:
    """What one training step needs on a device.

    peak_bytes is what `torch.cuda.max_memory_allocated` will say; the driver shows
    `reserved_bytes + context_bytes`. `error_bar` is relative. `estimated`: by formula, since the
    step could not be traced; it says why. Of `num_runs` trainings in one pass `config` is that of
    the first.
    """

    config: RunConfig
    device: Device
    step: StepKind
    accounts: Accounts = field(repr=False)
    error_bar: float | int = ERROR_BAR
    estimated: str = ""
    num_runs: int = 1

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes in tensors and libraries' workspaces."""
        return round(self.accounts.highest[1].allocated)

    @property
    def needed_bytes(self) -> int:
        """What the device must hold for the plan to be safe: peak, its error, the context."""
        return round(self.peak_bytes * (1 + self.error_bar)) + self.device.context_bytes

    @property
    def usable_bytes(self) -> int:
        """The capacity less the safety margin."""
        return round(self.device.capacity_bytes * (1 - SAFETY_MARGIN))

    @property
    def fits(self) -> bool:
        """Whether the step fits the device with its error bar and the safety margin."""
        return self.needed_bytes <= self.usable_bytes

    @property
    def phase(self) -> str:
        """In words, when the peak is."""
        return phase_name(self.accounts.highest[0])

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak by what they are held for, largest first; they add up to it."""
        parts = whole_numbers(self.accounts.highest[1].parts, self.peak_bytes)
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


def phase_name(stretch: Stretch) -> str:
    """A stretch of the step in words: "backward, last block"."""
    if stretch.block is not None:
        return f"{stretch.phase}, {block_name(stretch.block)}"
    if stretch.phase in ("optimiser", "after backward"):
        return f"{stretch.phase} ({stretch.op.partition('.')[0]})"
    return f"{stretch.phase}, {stretch.kind or 'outside of the model'}"


def block_name(block: int) -> str:
    """A block of a run in words."""
    if block in (0, -1):
        return "last block" if block else "first block"
    return f"block {-block} from the last" if block < 0 else f"block {block + 1}"


@dataclass(frozen=True)
class Planner:
    """Makes plans of one device and one kind of step; a model's shapes are made once.

    `model`, a module or what makes one, takes the place of `model.name` in every plan.
    """

    device: Device
    step: StepKind = "own"
    model: ModelSource | None = None
    _sources: dict[str, Traceable] = field(default_factory=dict, repr=False)
    _plans: dict[tuple[str, tuple[int, ...]], Plan] = field(default_factory=dict, repr=False)

    def plan(self, config: RunConfig, rows: Sequence[Encoded] = (), *, quick: bool = False) -> Plan:
        """The plan of `config`'s training step, on `rows` where they are known.

        A few of the blocks that repeat are traced, and the rest follows from them. Where what the
        allocator leaves on its pieces matters, which follows no line, all of them are traced, but
        not where `quick`.

        A step that cannot be traced gets an estimate, marked as such (`Plan.estimated`). Raises
        any error of the settings.
        """
        key = (config.model_dump_json(), tuple(len(row.input_ids) for row in rows))
        with collector_paused():  # of the many small objects that fake tensors make
            known = self._plans.get(key)
            if known is None:
                known = self._plans[key] = self._made(config, rows, whole=False)
            if not quick and is_uneven(known, self._source(config).runs):
                known = self._plans[key] = self._made(config, rows, whole=True)
        return known

    def _made(self, config: RunConfig, rows: Sequence[Encoded], *, whole: bool) -> Plan:
        source = self._source(config)
        try:
            accounts = predict(config, self.device, source=source, rows=rows, whole=whole)
        except UntraceableError as error:
            accounts = estimate(config, source.model)
            return Plan(config, self.device, self.step, accounts, ESTIMATE_ERROR_BAR, error.cause)
        return Plan(config, self.device, self.step, accounts)

    def num_trained(self, config: RunConfig) -> int:
        """How many parameters the step trains."""
        return self._source(config).num_trained

    def position_limit(self, config: RunConfig) -> int | None:
        """How many tokens a row of the model can have; None where it does not say."""
        settings = getattr(self._source(config).model, "config", None)
        return getattr(settings, "max_position_embeddings", None)

    def attention_layers(self, config: RunConfig) -> list[str]:
        """Paths inside a block of the linear layers of its attention."""
        return linear_layers(self._source(config).model, "attention")

    def _source(self, config: RunConfig) -> Traceable:
        key = config.replace(
            training__batch_size=1, training__accumulation=1, data__max_tokens=1
        ).model_dump_json()
        if key not in self._sources:
            with planned_for(self.device.type):
                self._sources[key] = traceable(config, self.step, self.model)
        return self._sources[key]


def is_uneven(made: Plan, runs: Sequence[Run]) -> bool:
    """Whether the plan is extended, has much left on its pieces, and few enough blocks."""
    highest = made.accounts.highest[1]
    extended = made.accounts.reserved is None and not made.estimated
    leftovers = highest.unsplit > UNEVEN_SHARE * highest.rounded
    return extended and leftovers and sum(run.length for run in runs) <= WHOLE_BLOCKS


def whole_numbers(parts: Mapping[str, float | int], total: int) -> dict[str, int]:
    """Parts rounded to bytes so that they still add up."""
    rounded = {kind: round(held) for kind, held in parts.items() if round(held) > 0}
    largest = max(rounded, key=lambda kind: rounded[kind])
    rounded[largest] += total - sum(rounded.values())
    return rounded
