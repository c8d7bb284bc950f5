"""Will it fit? One training step traced without weights -> memory timeline -> what fits."""

from loralab.planning.devices import DEVICES, Device, find_device
from loralab.planning.levers import Lever, levers
from loralab.planning.plan import Plan, Planner
from loralab.planning.solve import largest
from loralab.planning.steps import ModelSource, StepKind

__all__ = [
    "DEVICES",
    "Device",
    "Lever",
    "ModelSource",
    "Plan",
    "Planner",
    "StepKind",
    "find_device",
    "largest",
    "levers",
]
