"""Run settings: frozen, strictly loaded. This package imports no torch."""

from loralab.config.sections import (
    DataSection,
    Dtype,
    ImagesSection,
    Initialisation,
    MethodKind,
    MethodSection,
    ModelSection,
    Section,
    Task,
    TrainingSection,
)
from loralab.config.settings import (
    SECTIONS,
    RunConfig,
    config_without_rows,
    load_config,
    parse_config,
    read_recipe,
    shipped_recipes,
    shipped_text,
    with_overrides,
)

__all__ = [
    "SECTIONS",
    "DataSection",
    "Dtype",
    "ImagesSection",
    "Initialisation",
    "MethodKind",
    "MethodSection",
    "ModelSection",
    "RunConfig",
    "Section",
    "Task",
    "TrainingSection",
    "config_without_rows",
    "load_config",
    "parse_config",
    "read_recipe",
    "shipped_recipes",
    "shipped_text",
    "with_overrides",
]
