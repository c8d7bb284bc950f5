import torch
from peft_oracle import peft_reads, peft_runs
import copy
from loralab.adapters import *


def shake(model, name):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


def test_it(llama, ids, tmp_path):
    base = copy.deepcopy(llama)
    want = base(ids).logits
    attach(llama, LoRAConfig(rank=4, alpha=8, whole_modules=["score"]), "a")
    assert torch.equal(llama(ids).logits, want)
    attach(
        llama,
        LoRAConfig(
            rank=2,
            targets=["q_proj", "down_proj"],
            scaling="alpha/sqrt(rank)",
            whole_modules=["score"],
        ),
        "b",
    )
    shake(llama, "a")
    shake(llama, "b")
    twin = copy.deepcopy(llama)

    def out(route):
        with use(llama, route), torch.no_grad():
            return llama(ids).logits

    a, b = out("a"), out("b")
    mixed = out(["a", "b", None, "a"])
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1], want[2], a[3]]))
    torch.testing.assert_close(
        out(["a", {"b": 1.0}, {"a": 0.0}, {"a": 0.5, "b": -1}])[:3],
        torch.stack([a[0], b[1], want[2]]),
    )
    for name, expected in (("a", a), ("b", b)):
        save_adapter(llama, name, tmp_path / name)
        theirs = peft_reads(base, tmp_path / name)
        torch.testing.assert_close(peft_runs(theirs, ids).logits, expected, atol=1e-5, rtol=1e-5)
        fresh = copy.deepcopy(base)
        load_adapter(fresh, tmp_path / name, "x")
        with use(fresh, "x"):
            torch.testing.assert_close(fresh(ids).logits, expected)
    detach(llama, "a")
    detach(llama, "b")
    assert type(llama.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(llama(ids).logits, want)
    with use(twin, "a"):
        torch.testing.assert_close(twin(ids).logits, a)
    assert all(p.requires_grad for p in llama.parameters())
