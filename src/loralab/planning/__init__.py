"""Will it fit? One training step traced without weights -> memory timeline -> what fits."""

from loralab.planning.curve import curve
from loralab.planning.devices import DEVICES, Device, find_device
from loralab.planning.levers import Lever, levers
from loralab.planning.packed import most_runs, pass_levers, plan_pass
from loralab.planning.plan import Plan, Planner
from loralab.planning.serving import ServingPlan, plan_serving
from loralab.planning.solve import Quantity, largest
from loralab.planning.sources import meta_model
from loralab.planning.speed import Speed, speed_of, step_seconds
from loralab.planning.steps import ModelSource, StepKind
from loralab.planning.verify import Verification, verify

__all__ = [
    "DEVICES",
    "Device",
    "Lever",
    "ModelSource",
    "Plan",
    "Planner",
    "Quantity",
    "ServingPlan",
    "Speed",
    "StepKind",
    "Verification",
    "curve",
    "find_device",
    "largest",
    "levers",
    "meta_model",
    "most_runs",
    "pass_levers",
    "plan_pass",
    "plan_serving",
    "speed_of",
    "step_seconds",
    "verify",
]
