"""Methods, the training loop as a generator of events, checkpoints, predictions, the doctor."""

from loralab.training.compiling import CompileChoice
from loralab.training.devices import choose_device, use_threads
from loralab.training.doctor import examine, examine_setup
from loralab.training.effective_step import EffectiveStep, effective_step, summarise
from loralab.training.events import (
    CheckpointSaved,
    Event,
    Examined,
    Finding,
    Finished,
    Started,
    StepDone,
    Validated,
)
from loralab.training.halving import Contender
from loralab.training.identity import environment
from loralab.training.loop import fit
from loralab.training.many import SHARED, Failed, Stopped, fit_many, prepare_many
from loralab.training.methods import ADAPTER_NAME, ParameterGroup, Trainable, prepare
from loralab.training.objective import (
    Joint,
    MakesJoint,
    MakesObjective,
    Objective,
    Prediction,
    accuracy,
    mean_nll,
)
from loralab.training.plan import Plan, lay_out
from loralab.training.predict import predict
from loralab.training.prefix import PrefixStore
from loralab.training.schedule import Schedule, build_schedule
from loralab.training.shared_step import repeatable_pass
from loralab.training.starting import START_FILE, lora_config
from loralab.training.step import Outcome, choose_compile, pieces_of, repeatable_step
from loralab.training.streams import RunStream, stream_seed

__all__ = [
    "ADAPTER_NAME",
    "SHARED",
    "START_FILE",
    "CheckpointSaved",
    "CompileChoice",
    "Contender",
    "EffectiveStep",
    "Event",
    "Examined",
    "Failed",
    "Finding",
    "Finished",
    "Joint",
    "MakesJoint",
    "MakesObjective",
    "Objective",
    "Outcome",
    "ParameterGroup",
    "Plan",
    "Prediction",
    "PrefixStore",
    "RunStream",
    "Schedule",
    "Started",
    "StepDone",
    "Stopped",
    "Trainable",
    "Validated",
    "accuracy",
    "build_schedule",
    "choose_compile",
    "choose_device",
    "effective_step",
    "environment",
    "examine",
    "examine_setup",
    "fit",
    "fit_many",
    "lay_out",
    "lora_config",
    "mean_nll",
    "pieces_of",
    "predict",
    "prepare",
    "prepare_many",
    "repeatable_pass",
    "repeatable_step",
    "stream_seed",
    "summarise",
    "use_threads",
]
