"""What verbs do with image models: train adapters on one base, judge them, draw with them."""

from loralab.runs.images.evaluating import evaluate_images
from loralab.runs.images.examining import examine_images
from loralab.runs.images.generating import Wanted, generate_images, parse_prompt
from loralab.runs.images.subject import ImageSubject, Judgement, open_subject
from loralab.runs.images.training import resume_images, train_images

__all__ = [
    "ImageSubject",
    "Judgement",
    "Wanted",
    "evaluate_images",
    "examine_images",
    "generate_images",
    "open_subject",
    "parse_prompt",
    "resume_images",
    "train_images",
]
