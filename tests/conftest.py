"""What holds for the tests of every room.

Where there is no GPU, Triton interprets the kernels for GPUs; it asks when it is imported.
"""

import os

import torch

import checked_calls

checked_calls.install()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
