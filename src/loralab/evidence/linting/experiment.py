"""An experiment as the linter sees it: what its arms did, and what is claimed of them.

The same values come from runs and recipes of loralab and from a description (a TOML file with
`[[arms]]` and `[[claims]]`) of an experiment that was never run here. Whatever is not told is None,
and the rules that need it stay silent.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from loralab.config import MethodKind, Section
from loralab.errors import ConfigError, nearest

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Data(Section):
    """The rows. available_test_rows: what the data set has of them; sampled or not."""

    train_rows: Count | None = None
    validation_rows: Count | None = None
    test_rows: Count | None = None
    available_test_rows: Count | None = None
    max_tokens: Count | None = None
    padding: Literal["longest", "max_tokens"] | None = None


class Arm(Section):
    """One of the things that are compared.

    stands_for: what the conclusion calls it. rates_tried: learning rates that were trained, with
    `learning_rate` the one whose result is shown. warmup: as a share of the steps, where steps are
    not told. data_order: any name; equal names are equal orders. restored: which checkpoint the
    figures are of. loss and validation_loss: at the end. seconds: of the training.
    """

    name: str
    method: MethodKind
    stands_for: str | None = None
    total_parameters: Count | None = None
    trainable_parameters: Count | None = None
    frozen_layers: Count | None = None
    embedding_trained: bool | None = None
    rank: Count | None = None
    alpha: Positive | None = None
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    adapter_dropout: Share | None = None
    head_dropout: Share | None = None
    learning_rate: Positive | None = None
    head_learning_rate: Positive | None = None
    head_is_new: bool = False
    rates_tried: list[Positive] | None = None
    warmup_steps: Count | None = None
    warmup: Share | None = None
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count | None = None
    max_grad_norm: Positive | None = None
    seeds: list[int] | None = None
    data_order: str | None = None
    restored: Literal["best", "last"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    autocast: bool | None = None
    optimizer_path: Literal["foreach", "fused", "loop"] | None = None
    loss: float | None = None
    validation_loss: float | None = None
    accuracy: Share | None = None
    seconds: Positive | None = None

    @property
    def warmup_share(self) -> float | None:
        """Warm-up over steps; above 1 where it never ends."""
        if self.warmup_steps is not None and self.steps:
            return self.warmup_steps / self.steps
        return self.warmup

    @property
    def scale(self) -> float | None:
        """The factor before `B @ A`."""
        if self.rank is None or self.alpha is None:
            return None
        return self.alpha / (self.rank if self.scaling == "alpha/rank" else self.rank**0.5)


class Claim(Section):
    """A sentence of the conclusion, and what stands behind it.

    ran: whether that was run at all. evidence: where the figures behind it are. rows: that it was
    measured on; share: the accuracy claimed. batch_size, other_batch_size: of a memory claim;
    found_maximum: whether the other one is the largest that fits. counted_as_failed_when_skipped:
    the code that says "failed" says so too when the arm was left out.
    """

    kind: Literal[
        "difference",
        "accuracy",
        "out-of-memory",
        "larger-batch",
        "cheaper",
        "parameter-efficiency",
        "regularisation",
    ]
    text: str
    arm: str | None = None
    against: str | None = None
    ran: bool | None = None
    evidence: Literal["file", "log", "comment", "none"] | None = None
    tested: bool | None = None
    rows: Count | None = None
    share: Share | None = None
    batch_size: Count | None = None
    other_batch_size: Count | None = None
    found_maximum: bool | None = None
    counted_as_failed_when_skipped: bool = False
    optimizer_path: Literal["foreach", "fused", "loop"] | None = None
    parameters: Count | None = None
    capacity_gib: Positive | None = None


class Experiment(Section):
    """Everything told of one comparison.

    selected_on: the rows on which rates and checkpoints were chosen. num_layers is what the model
    has, stated_layers what the text says it has. results_found_by: how a figure finds its run.
    """

    title: str
    num_layers: Count | None = None
    stated_layers: Count | None = None
    selected_on: Literal["validation", "test"] | None = None
    predictions_saved: bool | None = None
    versions: Literal["pinned", "floating"] | None = None
    results_found_by: Literal["name", "modification time"] | None = None
    missing_files: list[str] = Field(default_factory=list)
    data: Data = Data()
    arms: Annotated[list[Arm], Field(min_length=1)]
    claims: list[Claim] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_are_known(self) -> "Experiment":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have the same name")
        for claim in self.claims:
            for name in (claim.arm, claim.against):
                if name is not None and name not in names:
                    raise ValueError(f"a claim speaks of arm {name!r}; {nearest(name, names)}")
        return self

    def arm(self, name: str | None) -> Arm | None:
        """The arm of that name."""
        return next((arm for arm in self.arms if arm.name == name), None)


def parse_description(tables: dict[str, Any], source: str) -> Experiment:
    """Tables of a description -> `Experiment`; raises `ConfigError` that lists every fault."""
    try:
        return Experiment.model_validate(tables)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"]) or "description"
            hint = ""
            if fault["type"] == "extra_forbidden":
                hint = f"; {nearest(str(fault['loc'][-1]), _known(fault['loc']))}"
            faults.append(f"{place}: {str(fault['msg']).removeprefix('Value error, ')}{hint}")
        raise ConfigError(
            "\n  - ".join([f"{source}: {len(faults)} fault(s) in the description", *faults]),
            "mend them all; docs/linting.md lists every key.",
        ) from None


def _known(place: tuple[Any, ...]) -> list[str]:
    tables = {"data": Data, "arms": Arm, "claims": Claim}
    table = tables.get(str(place[0]), Experiment) if len(place) > 1 else Experiment
    return list(table.model_fields)
