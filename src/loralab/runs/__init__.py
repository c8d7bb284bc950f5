"""What each verb does: the rooms put together."""

from loralab.runs.compare import compare
from loralab.runs.evaluate import evaluate
from loralab.runs.folder import Run, open_run
from loralab.runs.generate import generate
from loralab.runs.train import resume, train

__all__ = ["Run", "compare", "evaluate", "generate", "open_run", "resume", "train"]
