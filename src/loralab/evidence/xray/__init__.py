"""What is inside an adapter, or between two checkpoints: spectra, size, intruders, overlap."""

from loralab.evidence.xray.adapter import OtherTensor, Weights, XRay, xray
from loralab.evidence.xray.against import ModuleOverlap, Overlap, SideOverlap
from loralab.evidence.xray.checkpoints import NamedWeights, xray_difference
from loralab.evidence.xray.dimension import Dimension, LayerDimension, dimension, layer_dimensions
from loralab.evidence.xray.figures import BaseFigures, ModuleFigures
from loralab.evidence.xray.summary import figures, summarise

__all__ = [
    "BaseFigures",
    "Dimension",
    "LayerDimension",
    "ModuleFigures",
    "ModuleOverlap",
    "NamedWeights",
    "OtherTensor",
    "Overlap",
    "SideOverlap",
    "Weights",
    "XRay",
    "dimension",
    "figures",
    "layer_dimensions",
    "summarise",
    "xray",
    "xray_difference",
]
