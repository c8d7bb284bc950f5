"""The fast runner gives what the model gives under `use`, whatever stands beside a row."""

import copy
import ctypes
import os
from typing import Any

import numpy as np
import pytest
import torch
from fast_models import (
    ENTRIES,
    SIZES,
    STEPS,
    build_model,
    host,
    needs_kernel,
    one_thread,
    runner_of,
    tokens,
    wanted,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loralab.adapters import detach, extract, install, merge_in_place, restore
from loralab.errors import RouteError
from loralab.native import NoKernelError, build, load_kernel
from loralab.serving.fast import fast_runner
from loralab.serving.fast.coverage import Factors
from loralab.serving.fast.kernel_step import KERNEL, KernelStep
from loralab.serving.fast.steps import TorchStep
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.runner import Chunk

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mistral"])
def test_every_chunk_gives_what_the_model_gives(kind: str, step: str) -> None:
    model = build_model(kind)
    runner = runner_of(model, step)
    host(model, "a", 1, rank=3)
    host(model, "b", 2, rank=8, targets=["q_proj", "up_proj", "down_proj"])
    host(model, "c", 3, rank=17, rank_pattern={"v_proj": 1}, scaling="alpha/sqrt(rank)")
    runner.adapters_changed()
    assert isinstance(runner.step, KernelStep if step == "kernel" else TorchStep)
    assert not runner.uncovered
    texts = [tokens(length, seed) for seed, length in enumerate((4, 9, 70, 17, 130))]
    cuts = [(0, 2), (0, 5), (0, 66), (0, 1), (0, 127)]
    for _ in range(3):  # a chunk each, then one token, then the rest
        chunks = [Chunk(i, texts[i][a:b], a, ENTRIES[i]) for i, (a, b) in enumerate(cuts)]
        found = runner.forward(chunks)
        for i, (_, end) in enumerate(cuts):
            expected = wanted(model, texts[i][:end], ENTRIES[i])[-1]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)
        cuts = [(b, min(b + 1, len(texts[i]))) for i, (_, b) in enumerate(cuts)]
    every = runner.all_logits(Chunk(0, texts[2], 0, ENTRIES[2]))
    torch.testing.assert_close(every, wanted(model, texts[2], ENTRIES[2]), atol=1e-4, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", ["kernel", "int8"])
def test_a_row_depends_on_nothing_beside_it_bit_for_bit(step: str, dtype: torch.dtype) -> None:
    model = build_model(dtype=dtype)
    runner = runner_of(model, step)
    for seed, (name, rank) in enumerate({"a": 3, "b": 8, "c": 16}.items()):
        host(model, name, seed, rank=rank)
    runner.adapters_changed()
    texts = [tokens(length, seed) for seed, length in enumerate((40, 9, 100, 17, 5))]
    alone = [
        runner.all_logits(Chunk(0, text, 0, e)) for text, e in zip(texts, ENTRIES, strict=True)
    ]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = [Chunk(i, text[:3], 0, ENTRIES[i]) for i, text in enumerate(texts)]
        together = runner.forward(first)
        assert all(torch.equal(row, each[2]) for row, each in zip(together, alone, strict=True))
        rest = [Chunk(i, text[3:], 3, ENTRIES[i]) for i, text in enumerate(texts)]
        together = runner.forward(rest[::-1])[torch.tensor([4, 3, 2, 1, 0])]
        assert all(torch.equal(row, each[-1]) for row, each in zip(together, alone, strict=True))


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_gives_the_same() -> None:
    runner = runner_of(build_model(), "kernel")
    torch.set_num_threads(2)
    before = runner.all_logits(Chunk(0, tokens(9), 0, None)).clone()
    child = os.fork()
    if child == 0:  # says by its exit whether it got the same, and ends as a process does
        same = torch.equal(runner.all_logits(Chunk(0, tokens(9), 0, None)), before)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_kernel
def test_bf16_errs_no_more_than_the_models_own_bf16() -> None:
    exact = build_model()
    host(exact, "a", 1)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    runner = runner_of(rounded, "kernel")
    ids = tokens(60)
    truth = wanted(exact, ids, "a")
    ours = (runner.all_logits(Chunk(0, ids, 0, "a")) - truth).norm()
    theirs = (wanted(rounded, ids, "a") - truth).norm()
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("step", STEPS)
def test_what_other_slots_and_later_places_hold_is_never_read(step: str) -> None:
    model = build_model()
    runner = runner_of(model, step)
    for kept in (runner.step.cache.keys, runner.step.cache.values):
        kept.fill_(torch.nan)
    texts = [tokens(length, length) for length in (3, 30)]
    found = runner.forward([Chunk(i, text[:-1], 0) for i, text in enumerate(texts)])
    found = runner.forward([Chunk(i, t[-1:], len(t) - 1) for i, t in enumerate(texts)])
    for row, text in zip(found, texts, strict=True):
        torch.testing.assert_close(row, wanted(model, text, None)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_a_copied_prefix_continues_as_the_original_would(step: str) -> None:
    model = build_model()
    host(model, "a", 1)
    runner = runner_of(model, step)
    text = tokens(20)
    runner.forward([Chunk(1, text, 0, "a")])
    runner.copy_prefix(1, 4, 12)
    other = [*text[:12], *tokens(5, 9)]
    found = runner.forward([Chunk(4, other[12:], 12, "a")])[0]
    torch.testing.assert_close(found, wanted(model, other, "a")[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_adapters_come_change_and_go(step: str) -> None:
    model = build_model()
    runner = runner_of(model, step)
    text = tokens(12)

    def check(entry: Any) -> None:
        found = runner.all_logits(Chunk(0, text, 0, entry))
        torch.testing.assert_close(found, wanted(model, text, entry), atol=1e-4, rtol=1e-4)

    check(None)
    for seed, name in enumerate("abc"):
        host(model, name, seed, rank=4 + seed)
    runner.adapters_changed()
    check("a")
    detach(model, "a")
    host(model, "a", 9, rank=5)  # another adapter under the same name
    runner.adapters_changed()
    check("a")
    with torch.no_grad():  # the same tensors, written to
        for name, parameter in model.named_parameters():
            if name.endswith("adapters.b.B"):
                parameter.mul_(-2)
    runner.adapters_changed()
    check({"a": 1.0, "b": 0.25})
    detach(model, "c")
    runner.adapters_changed()
    check("b")
    with pytest.raises(RouteError, match="hosts no adapter 'c'"):
        runner.forward([Chunk(0, text, 0, "c")])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("changes", [{}, {"dora": True}], ids=["plain", "DoRA"])
def test_what_is_prepared_beside_the_steps_is_what_is_hosted(step: str, changes: Any) -> None:
    made = build_model()
    host(made, "a", 1, rank=5, **changes)
    value, text = extract(made, "a"), tokens(12)
    model = build_model()
    runner = runner_of(model, step)
    runner.prepare("a", value)
    install(model, value, "a", copy=False)
    runner.adapters_changed(only=["a"])
    found = runner.all_logits(Chunk(0, text, 0, "a"))
    torch.testing.assert_close(found, wanted(made, text, "a"), atol=1e-4, rtol=1e-4)


def test_what_is_prepared_and_not_hosted_is_forgotten() -> None:
    model, text = build_model(), tokens(12)
    host(model, "a", 1)
    value = extract(model, "a")
    detach(model, "a")
    runner = runner_of(model, "torch")
    runner.prepare("a", value)
    runner.adapters_changed(only=["a"])
    host(model, "a", 2)
    runner.adapters_changed(only=["a"])
    found = runner.all_logits(Chunk(0, text, 0, "a"))
    torch.testing.assert_close(found, wanted(model, text, "a"), atol=1e-4, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6, 16, 19])
def test_packed_factors_are_the_factors_rounded(dtype: torch.dtype, rank: int) -> None:
    model = build_model(dtype=dtype)
    step = runner_of(model, "kernel").step
    draw = torch.Generator().manual_seed(rank)
    pair = Factors(
        torch.randn(rank, 64, generator=draw), torch.randn(40, rank, generator=draw), 0.5
    )
    packed = step.prepare([[pair, *[None] * 6], [None] * 7]).result()
    kind, padded = (np.int32 if dtype == torch.float32 else np.int16), -(-rank // 4) * 4

    def numbers(address: int, count: int) -> torch.Tensor:
        raw = ctypes.string_at(address, count * dtype.itemsize)
        return torch.from_numpy(np.frombuffer(raw, dtype=kind).copy()).view(dtype)

    A = numbers(packed.pairs[0].A, padded * 64).view(padded, 64)
    assert torch.equal(A[:rank], pair.A.to(dtype)) and not A[rank:].any()
    together = 4 // dtype.itemsize  # ranks side by side
    tiles = numbers(packed.pairs[0].B, 64 * padded).view(2, padded // together, 32, together)
    B = tiles.permute(0, 2, 1, 3).reshape(64, padded)
    assert torch.equal(B[:40, :rank], pair.B.to(dtype))
    assert not B[40:].any() and not B[:, rank:].any()
    assert (packed.pairs[0].rank, packed.most_rank, packed.pairs[1].rank) == (padded, padded, 0)


@pytest.mark.parametrize("step", STEPS)
def test_a_merged_adapter_is_in_the_weights_until_the_base_is_back(step: str) -> None:
    model = build_model()
    host(model, "a", 1)
    host(model, "b", 2)
    runner = runner_of(model, step)
    text = tokens(12)
    base, apart = (runner.all_logits(Chunk(0, text, 0, entry)) for entry in (None, "a"))
    merge_in_place(model, "a")
    runner.adapters_changed()
    for entry in (None, "a"):
        found = runner.all_logits(Chunk(0, text, 0, entry))
        torch.testing.assert_close(found, apart, atol=1e-4, rtol=1e-4)
    with pytest.raises(RouteError, match="'a' is merged"):
        runner.forward([Chunk(0, text, 0, "b")])
    restore(model)
    runner.adapters_changed()
    assert torch.equal(runner.all_logits(Chunk(0, text, 0, None)), base)


@pytest.mark.parametrize(
    "changes",
    [
        {"dora": True},
        {"biases": "all"},
        {"whole_modules": ["lm_head"]},
        {"targets": ["q_proj", "embed_tokens"]},
    ],
    ids=["DoRA", "biases", "whole modules", "embedding"],
)
def test_what_the_step_does_not_cover_runs_plainly_in_the_same_batch(changes: Any) -> None:
    model = build_model()
    runner = runner_of(model, "kernel")
    host(model, "plain", 1)
    host(model, "other", 2, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.other" in name:
                parameter.add_(0.05)
    runner.adapters_changed()
    assert list(runner.uncovered) == ["other"]
    text, entries = tokens(15), ["other", "plain", None, {"plain": 0.5, "other": 0.5}]
    for a, b in ((0, 9), (9, 14), (14, 15)):
        found = runner.forward([Chunk(i, text[a:b], a, e) for i, e in enumerate(entries)])
        for row, entry in zip(found, entries, strict=True):
            expected = wanted(model, text[:b], entry)[-1]
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    # a sequence that changes sides takes along what its slot held
    found = runner.forward([Chunk(0, [7], 15, "other")])
    detach(model, "other")
    runner.adapters_changed()
    found = runner.forward([Chunk(0, [8], 16, "plain")])[0]
    expected = wanted(model, [*text, 7, 8], "plain")[-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_models_without_the_formula_are_left_to_the_plain_runner() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60))
    windows = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20))
    more_norms = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    for model in (gpt2, windows, more_norms):
        runner = fast_runner(
            model,
            lambda model=model: PlainRunner(model, num_slots=2, max_tokens=64),
            num_slots=2,
            max_tokens=64,
        )
        assert isinstance(runner, PlainRunner)


def test_without_a_kernel_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_KERNELS", "off")
    load_kernel.cache_clear()
    try:
        assert isinstance(runner_of(build_model(), "kernel").step, TorchStep)
    finally:
        load_kernel.cache_clear()


def test_a_missing_compiler_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_kernel.cache_clear()
    try:
        for _ in range(2):
            assert load_kernel(KERNEL) is None
        assert caplog.text.count("no C++ compiler (no-such-compiler) is installed") == 1
    finally:
        load_kernel.cache_clear()


@needs_kernel
def test_a_library_is_made_once_and_only_where_nobody_else_writes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    made = build(KERNEL, ("-O0",))
    stamp = made.stat().st_mtime_ns
    assert build(KERNEL, ("-O0",)) == made
    assert made.stat().st_mtime_ns == stamp
    assert [path.name for path in folder.iterdir()] == [made.name]
    folder.chmod(0o777)
    with pytest.raises(NoKernelError, match="other users"):
        build(KERNEL, ("-O0",))
