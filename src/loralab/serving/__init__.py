"""Serving: many adapters on one frozen base, in one batch."""

from loralab.serving.answer import Ticket
from loralab.serving.encoder import ModelEncoder
from loralab.serving.engine import Engine
from loralab.serving.merged import MergedMode
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.policy import MergePolicy
from loralab.serving.requests import Piece, Request, Sampling
from loralab.serving.runner import Chunk, Encoder, Runner
from loralab.serving.sampling import Chosen

__all__ = [
    "Chosen",
    "Chunk",
    "Encoder",
    "Engine",
    "MergePolicy",
    "MergedMode",
    "ModelEncoder",
    "Piece",
    "PlainRunner",
    "Request",
    "Runner",
    "Sampling",
    "Ticket",
]
