"""What CUDA keeps and allocates, fact by fact, and the allocator's own rules."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from plan_settings import settings
from torch import Tensor, nn

from loralab.fusion.attention import attend
from loralab.placement import planned_for
from loralab.planning import Planner, find_device
from loralab.planning.allocator import MIB, CachingAllocator, rounded_size
from loralab.planning.facts import choose_attention, cublas_workspace_bytes, rules_for
from loralab.planning.trace import Tracer

ROWS, WIDTH = 64, 128


def kept(function: Callable[[Tensor], Tensor], device: str, *shape: int) -> int:
    """Bytes that a training forward of `function` leaves behind, its input not counted."""
    tracer = Tracer(rules_for(find_device(device)))
    x = tracer.stand_in(nn.Parameter(torch.empty(shape or (ROWS, WIDTH), device="meta")))
    tracer.label([x], "weights")
    with tracer.world({}):
        tracer.begin()
        y = function(x)
        blocks = tracer.timeline().blocks
        held = sum(b.num_bytes for b in blocks if b.died is None and not b.kind)
    assert y is not None
    return held


def test_dropout_keeps_a_byte_a_number_on_cuda_and_four_on_the_cpu():
    output = ROWS * WIDTH * 4
    assert kept(lambda x: F.dropout(x, 0.1), "a10") == output + ROWS * WIDTH
    assert kept(lambda x: F.dropout(x, 0.1), "cpu") == output + ROWS * WIDTH * 4


@pytest.mark.parametrize("device", ["a10", "cpu"])
def test_an_idle_dropout_keeps_nothing(device):
    assert kept(lambda x: F.dropout(x, 0.1, training=False), device) == 0


def test_efficient_attention_keeps_its_output_and_a_number_a_query():
    rows, heads, tokens, width = 2, 4, 96, 32
    held = kept(lambda x: F.scaled_dot_product_attention(x, x, x), "a10", 2, 4, 96, 32)
    output, log_sums = rows * heads * tokens * width * 4, rows * heads * tokens * 4
    assert output + log_sums <= held <= output + log_sums + 64


def test_plain_attention_keeps_its_weights():
    def plain(x: Tensor) -> Tensor:  # 31 numbers a head: no kernel of its own takes that
        return F.scaled_dot_product_attention(x, x, x)

    assert kept(plain, "a10", 2, 4, 96, 31) >= 2 * 4 * 96 * 96 * 4


@pytest.mark.parametrize(
    ("dtype", "width", "masked", "kv_heads", "capability", "expected"),
    [
        (torch.float32, 64, False, 8, 8, "efficient"),
        (torch.float32, 64, True, 8, 8, "efficient"),
        (torch.float32, 64, False, 2, 8, "math"),  # grouped heads, and no half
        (torch.float32, 66, False, 8, 8, "math"),
        (torch.bfloat16, 64, False, 8, 8, "flash"),
        (torch.bfloat16, 64, False, 2, 8, "flash"),
        (torch.bfloat16, 64, True, 8, 8, "efficient"),
        (torch.bfloat16, 64, True, 2, 8, "math"),
        (torch.bfloat16, 512, False, 8, 8, "efficient"),
        (torch.bfloat16, 64, False, 8, 9, "cudnn"),
        (torch.bfloat16, 64, False, 8, 7, "efficient"),
    ],
)
def test_which_attention_runs(dtype, width, masked, kv_heads, capability, expected):
    query = torch.empty(2, 8, 32, width, dtype=dtype, device="meta")
    key = torch.empty(2, kv_heads, 32, width, dtype=dtype, device="meta")
    mask = torch.empty(2, 1, 32, 32, dtype=torch.bool, device="meta") if masked else None
    chosen = choose_attention(
        query, key, key, mask, enable_gqa=kv_heads != 8, capability=capability
    )
    assert chosen == expected


def test_a_mask_becomes_numbers_at_every_layer():
    mask = torch.ones(2, 1, 96, 96, dtype=torch.bool)

    def masked(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    bare = kept(lambda x: F.scaled_dot_product_attention(x, x, x), "a10", 2, 4, 96, 32)
    assert kept(masked, "a10", 2, 4, 96, 32) - bare == 2 * 96 * 96 * 4


@pytest.mark.parametrize("device", ["a10", "cpu"])
def test_a_log_sum_of_exponentials_takes_room_for_them(device):
    tracer = Tracer(rules_for(find_device(device)))
    x = tracer.stand_in(nn.Parameter(torch.empty(ROWS, WIDTH, device="meta")))
    with tracer.world({}):
        tracer.begin()
        torch.logsumexp(x, dim=-1)
    taken = [b.num_bytes for b in tracer.timeline().blocks if b.kind == "kernel workspaces"]
    assert taken == [ROWS * WIDTH * 4]


def test_autocast_keeps_copies_of_weights_until_it_closes():
    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, x)

    copies, output = ROWS * WIDTH * 2, ROWS * ROWS * 2
    assert kept(cast, "cpu") == copies + output


def test_what_is_offloaded_leaves_the_device(config_file):
    more = {"training__batch_size": 32, "data__max_tokens": 300, "method__dropout": 0.0}
    config = settings(config_file("llama", num_hidden_layers=4), **more)
    planner = Planner(find_device("a10"))
    kept = planner.plan(config, quick=True)
    offloaded = planner.plan(config.replace(training__offload_activations=True), quick=True)
    saved = sum(held for kind, held in kept.parts.items() if kind.startswith("activations"))
    assert not offloaded.estimated
    assert kept.peak_bytes - offloaded.peak_bytes > 0.6 * saved


def test_a_plan_for_cuda_takes_cudas_branches():
    seen = {}
    for device in ("a10", "cpu"):
        with planned_for(device.replace("a10", "cuda")):
            q = torch.randn(1, 4, 40, 16)
            seen[device] = attend(q, q, q, None)[1].weights
    assert seen["a10"] is None  # torch's kernel
    assert seen["cpu"] is not None  # plain products


@pytest.mark.parametrize(("device", "each"), [("a10", 8 * MIB + 128 * 1024), ("h100", 32 * MIB)])
def test_cublas_takes_its_workspace_for_two_threads(device, each):
    assert cublas_workspace_bytes(find_device(device).capability) == 2 * each


def test_requests_are_rounded_to_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated == 512 + 1024
    assert allocator.reserved == 2 * MIB
    assert allocator.allocate(0) is None


@pytest.mark.parametrize(
    ("size", "reserved", "allocated"),
    [
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB + 1, 12 * MIB, 10 * MIB + 512),  # what is left is above 1 MiB: split off
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left is below: it is not
    ],
)
def test_segments(size, reserved, allocated):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert (allocator.reserved, allocator.allocated) == (reserved, allocated)


def test_freed_neighbours_merge_and_serve_again():
    allocator = CachingAllocator()
    pieces = [allocator.allocate(4 * MIB) for _ in range(5)]
    for piece in (pieces[1], pieces[3], pieces[2]):
        allocator.free(piece)
    assert allocator.allocate(12 * MIB) is not None
    assert allocator.reserved == 20 * MIB


def test_everything_freed_is_nothing_allocated():
    allocator = CachingAllocator()
    pieces = [allocator.allocate(size) for size in (3, 5_000_000, 70_000, 30_000_000)]
    for piece in pieces:
        allocator.free(piece)
    assert allocator.allocated == 0
    assert rounded_size(512) == 512
