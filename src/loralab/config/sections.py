"""The tables of a recipe: frozen, strict, each key with its kind and its bounds."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loralab.errors import ConfigError

MethodKind = Literal["lora", "full", "frozen", "head"]
Task = Literal["classification", "causal"]
"""What language models are trained for; `model.task` may be "image" too."""
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Initialisation = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga"]


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    return pattern


def _targets(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return _expression(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise ValueError('give "all-linear", a regular expression, or a list of names')


def _block_numbers(value: Any) -> Any:
    """`"0-3, 12"` -> `[0, 1, 2, 3, 12]`; a list stays as it is."""
    if not isinstance(value, str):
        return value
    numbers: list[int] = []
    for part in value.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if last < first:
            raise ValueError('give block numbers: a list, or ranges such as "0-3, 12-15"')
        numbers += range(first, last + 1)
    return numbers


Expression = Annotated[str, AfterValidator(_expression)]


class Section(BaseModel):
    """A table of settings: frozen, no unknown keys, no silent conversion of kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """Which base model, and what is put on top of it."""

    name: str
    task: Task | Literal["image"] = "classification"
    num_labels: Annotated[int, Field(ge=2)] = 2
    dtype: Dtype = "float32"
    head_bias: bool = False
    head_dropout: Fraction = 0.0
    dropout: Fraction | None = None  # the base's own dropouts; None keeps them
    pooling: Literal["native", "mean", "last"] = "native"

    @property
    def text_task(self) -> Task:
        """`task` for what reads text. Raises `ConfigError` where it is "image"."""
        if self.task == "image":
            raise ConfigError(
                f"{self.name} is an image model (model.task is 'image'), and this is for language"
                " models",
                "image recipes go with `train` and `doctor`, their runs with `evaluate` and"
                " `generate --image` (docs/images.md).",
            )
        return self.task

    def check_reads_text(self) -> None:
        """Raise `ConfigError` for an image model, before anything else is done."""
        _ = self.text_task


class DataSection(Section):
    """Which rows, from where, and which columns mean what.

    `name` is a catalogue name, a hub id or a local folder; `train`, `validation` and `test` are
    files (CSV, JSONL, Parquet), or the names of splits where `name` is a hub id.
    """

    name: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    train_rows: PositiveInt | None = None  # at most so many rows, chosen by hash
    validation_rows: PositiveInt | None = None
    test_rows: PositiveInt | None = None
    max_tokens: PositiveInt = 256
    min_rating: Annotated[float, Field(ge=0)] = 0.5  # rated texts with |rating| below are left out
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    group: str | None = None  # the column that names a row's document

    @model_validator(mode="after")
    def _has_a_source(self) -> "DataSection":
        if self.name is None and self.train is None:
            raise ValueError("give data.name (a catalogue name, hub id or folder) or data.train")
        return self


class MethodSection(Section):
    """How the model is fine-tuned. Each kind reads the keys that concern it.

    `rank_pattern` and `alpha_pattern` hold name endings or regular expressions of modules whose
    rank or alpha differs; the first that matches decides.
    """

    kind: MethodKind = "lora"
    rank: PositiveInt = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    targets: Annotated[str | list[str], BeforeValidator(_targets)] = "all-linear"
    exclude: list[str] = []
    layers: Annotated[list[NonNegativeInt] | None, BeforeValidator(_block_numbers)] = None  # all
    rank_pattern: dict[Expression, PositiveInt] = {}
    alpha_pattern: dict[Expression, Positive] = {}
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    init: Initialisation = "kaiming"
    init_rows: PositiveInt = 64  # training rows that eva and lora_ga look at, chosen by hash
    redistribute_ranks: bool = True  # eva: ranks go where the inputs vary most
    loraplus_lr_ratio: Positive = 1.0  # LoRA+: B's learning rate over A's
    dora: bool = False
    biases: Literal["none", "targets", "all"] = "none"
    whole_modules: list[str] = []  # trained copies beside the adapter; the head is always one
    token_rows: dict[str, list[NonNegativeInt]] = {}  # embedding -> rows that train (new tokens)
    frozen_layers: NonNegativeInt | None = None  # None: the lower half
    freeze_embedding: bool = True


class TrainingSection(Section):
    """The optimisation: every number that decides the trained weights, and the device."""

    learning_rate: Positive = 2e-4
    head_learning_rate: Positive | None = None  # None: the same as learning_rate
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Fraction = 0.06  # share of all steps
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    fused: bool = True
    master_weights: bool = True  # fp32 copies of what is trained in a half-precision model
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # 0: no clipping
    activation_checkpointing: bool = False
    offload_activations: bool = False  # to pinned memory of the host, for long rows on a GPU
    fuse_blocks: bool = True  # blocks found by structure run as one autograd function
    compile: Literal["off", "on", "auto"] = "off"  # the other blocks; "auto" times both ways
    cache_frozen_prefix: bool = False  # frozen lower blocks run once a row, without dropout
    evaluations_per_epoch: PositiveInt = 1
    patience: PositiveInt | None = None  # stop after so many validations without improvement
    checkpoint_steps: PositiveInt = 50
    evaluation_batch_size: PositiveInt = 64
    device: str = "auto"
    memory_plan: Literal["stop", "warn", "off"] = "stop"  # where the plan says it will not fit
    threads: PositiveInt | None = None
    sinks: list[Literal["tensorboard", "wandb"]] = []


class CompareSection(Section):
    """The contest: which methods, which learning rates each, how many seeds at the best one."""

    methods: list[MethodKind] = ["head", "lora", "frozen", "full"]
    learning_rates: dict[MethodKind, list[Positive]] = {}
    max_extensions: Annotated[int, Field(ge=0)] = 2
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3)] = [0, 1, 2]
    storage_tasks: PositiveInt = 10  # N in the storage sum: N models against one base, N adapters
    measured_steps: PositiveInt = 5
    stop_losers: bool = False  # successive halving of LoRA's sweep: the worse half stops early

    @model_validator(mode="after")
    def _no_repeats(self) -> "CompareSection":
        if len(set(self.methods)) < len(self.methods) or len(self.methods) < 2:
            raise ValueError("compare.methods needs at least two different methods")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("compare.seeds holds a seed twice")
        return self


class ImagesSection(Section):
    """What image models alone have; read where `model.task` is "image"."""

    sampling_steps: PositiveInt = 12
    guidance: Positive = 2.0

    # styles of handwritten digits
    styles: list[str] = []  # an adapter for each, all trained in one pass over the base
    class_dropout: Fraction = 0.1  # share of rows whose class is hidden, for guidance
    judged_images: NonNegativeInt = 80  # of each look, seen by judges; 0 leaves judges out

    # a folder of images for a Stable Diffusion base
    resolution: PositiveInt = 512
    prompt: str | None = None  # of images that have no caption of their own
    skip_unreadable: bool = False
    min_snr_gamma: Positive | None = None  # 5.0 is usual; None weights all timesteps alike
    prior_prompt: str | None = None  # prior preservation: what images of the class show
    prior_folder: str | None = None  # of such images; None: the base draws them
    num_prior_images: PositiveInt = 100  # that the base draws
    prior_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    validation_prompts: list[str] = []  # drawn at the end, beside the base's images
    sample_steps: PositiveInt | None = None  # drawn every so many steps, too
    negative_prompt: str = ""


TEXT_ONLY: dict[str, tuple[str, ...]] = {
    "model": ("num_labels", "head_bias", "head_dropout", "dropout", "pooling"),
    "data": (
        *("validation", "test", "validation_rows", "test_rows", "max_tokens", "min_rating"),
        *("text", "label", "prompt", "completion", "messages", "group"),
    ),
    "method": ("token_rows", "frozen_layers", "freeze_embedding", "init_rows"),
    "training": (
        *("head_learning_rate", "cache_frozen_prefix", "compile", "patience"),
        *("evaluations_per_epoch", "evaluation_batch_size"),
    ),
}
"""Settings that mean nothing to an image model."""

DIGITS_ONLY = ("styles", "class_dropout", "judged_images")
FOLDER_ONLY = (
    *("resolution", "prompt", "skip_unreadable", "min_snr_gamma", "prior_prompt", "prior_folder"),
    *("num_prior_images", "prior_weight", "validation_prompts", "sample_steps", "negative_prompt"),
)
"""Keys of `[images]` that only styles of digits read, and only folders of images."""
