"""The dtype is chosen by what the machine measures."""

import time

import torch

from loralab.models import build_model, choose_dtype


def test_the_choice_follows_the_measurement_and_is_said() -> None:
    chosen = choose_dtype("cpu")
    a = torch.randn(512, 512)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = a.to(dtype)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            _ = x @ x
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    if not 0.8 < speedup < 1.8:  # within this the two measurements may fall either way
        assert (chosen.dtype == "bfloat16") == (speedup > 1)
    assert str(chosen).startswith(f"{chosen.dtype}: bfloat16 is")


def test_a_model_may_be_built_in_the_chosen_dtype() -> None:
    model = build_model("smollm2-135m", dtype="auto")
    assert str(model.dtype) == f"torch.{choose_dtype('cpu').dtype}"
