"""What is inside an adapter, or between two checkpoints: spectra, size, intruders, overlap."""

from loralab.evidence.xray.adapter import OtherTensor, Weights, XRay, xray
from loralab.evidence.xray.against import ModuleOverlap, Overlap, SideOverlap
from loralab.evidence.xray.figures import BaseFigures, ModuleFigures
from loralab.evidence.xray.summary import figures, summarise

__all__ = [
    "BaseFigures",
    "ModuleFigures",
    "ModuleOverlap",
    "OtherTensor",
    "Overlap",
    "SideOverlap",
    "Weights",
    "XRay",
    "figures",
    "summarise",
    "xray",
]
