"""Three style adapters of one small image model, from nothing: trained, looked at, judged.

`python benchmarks/styles.py --json` runs `loralab train digits-styles` and prints the judges'
figures, seconds, where the grid lies, and what a training step costs: full fine-tuning's, ours and
PEFT's in turns, at the recipe's settings.

Meaning of the figures of a step (the UNet's, and of convolutions alone):
rho: multiplications of the pairs over those of the layers that have one, in a forward pass.
floor: (2 + 3 rho) / 3, LoRA's share of full fine-tuning's matrix work.
ours_over_full, peft_over_full: of medians. over_floor: ours_over_full / floor.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab import adapters
from loralab.config import MethodSection, RunConfig, load_config
from loralab.console import Console
from loralab.imaging import (
    BaseRecipe,
    DenoisingTask,
    ImageRow,
    digits_base,
    load_digits,
    styled,
)
from loralab.runs.folder import Run
from loralab.runs.images import generate_images
from loralab.runs.train import train
from loralab.training import Trainable, prepare, repeatable_step


def main() -> None:
    """Run everything and print one JSON document, or lines."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output or tempfile.mkdtemp(prefix="loralab-styles-"))
    if not arguments.cached:
        os.environ["LORALAB_CACHE"] = str(folder / "cache")
    found: dict[str, Any] = {} if arguments.step_only else verbs(folder, arguments)
    found["step"] = step(arguments.threads, arguments.repeats)
    found["convolutions"] = convolutions(arguments.repeats)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


def verbs(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The base, the styles and thirty images by the product's verbs; what judges say of them."""
    listen = Console(as_json=True).listen
    config = load_config("digits-styles", [f"training.threads={arguments.threads}"])
    base = digits_base(threads=arguments.threads, listen=listen)
    began = time.perf_counter()
    run = train(config, folder / "run", listen=listen)
    whole = time.perf_counter() - began
    names = list(run.manifest["adapters"])
    prompt = " ".join(f"{index % 10}:{names[index // 10]}" for index in range(30))
    drawn = generate_images(run.folder, prompt, folder / "thirty.png", listen=listen)
    judged = run.metrics("images")
    looks: dict[str, Any] = judged["looks"]
    return {
        "style_accuracy": {name: looks[name]["style_accuracy"]["mean"] for name in names},
        "digit_accuracy": {look: own["digit_accuracy"]["mean"] for look, own in looks.items()},
        "base_is_no_style": judged["metrics"]["base_is_no_style"]["mean"],
        "frechet_distance": {look: own["frechet_distance"] for look, own in looks.items()},
        "mixes": judged["mixes"],
        "merged": judged["merged"],
        "judges": judged["judges"],
        "seconds": {
            "base": json.loads((base / "training.json").read_text())["seconds"],
            "styles": _training_seconds(run),
            "styles_and_judging": whole,
            "30_images": drawn["seconds"],
        },
        "images_of_each": judged["rows"] // len(looks),
        "threads": arguments.threads,
        "grid": str(run.folder / judged["grid"]),
        "report": str(run.folder / "report.html"),
    }


def _training_seconds(run: Run) -> float:
    """Of all steps of all styles."""
    return sum(row["seconds"] for row in run.rows_of("timing.jsonl") if "seconds" in row)


def step(threads: int, repeats: int) -> dict[str, Any]:
    """Whole training steps of one style at the recipe's settings, the three kinds in turns."""
    config = load_config("digits-styles", [f"training.threads={threads}"])
    rows = styled(load_digits().train, "bold")[: config.training.batch_size]
    full = _trainable(config, MethodSection(kind="full"))
    ours = _trainable(config, config.method)
    steps = {
        "full": repeatable_step(full, rows),
        "ours": repeatable_step(ours, rows),
        "peft": _peft_step(config, rows),
    }
    compared = _compared(_in_turns(steps, repeats), _calls(config), config.method.rank)
    return compared | {"rows": len(rows)}


Call = tuple[nn.Module, Tensor, Tensor]  # a layer with its input and its output


def _calls(config: RunConfig) -> dict[str, Call]:
    """The layers that get a pair, at a batch of the recipe."""
    unet, calls = BaseRecipe().build().unet.train(), {}
    for name, module in unet.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in config.method.targets):
            module.register_forward_hook(
                lambda module, inputs, y, name=name: calls.__setitem__(
                    name, (module, inputs[0].detach(), y.detach())
                )
            )
    rows = config.training.batch_size
    unet(torch.randn(rows, 16, 8, 8), torch.arange(rows), class_labels=torch.arange(rows) % 10)
    return calls


def _compared(seconds: dict[str, float], calls: dict[str, Call], rank: int) -> dict[str, Any]:
    work = pairs = 0
    for module, _, y in calls.values():
        weight: Any = module.weight
        places = y.numel() // len(weight)
        work += places * weight.numel()
        pairs += places * rank * (weight[0].numel() + len(weight))
    floor = (2 + 3 * pairs / work) / 3
    return {
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "rho": pairs / work,
        "floor": floor,
        "ours_over_full": seconds["ours"] / seconds["full"],
        "peft_over_full": seconds["peft"] / seconds["full"],
        "over_floor": seconds["ours"] / seconds["full"] / floor,
    }


SIZES = ((32, 32, 16), (32, 64, 16), (32, 128, 8), (8, 128, 32), (4, 320, 32))
"""Of single 3 x 3 convolutions: rows, channels, height and width of an image."""


def convolutions(repeats: int) -> dict[str, Any]:
    """Forward and backward of convolutions alone, the three kinds in turns: the UNet's, and of
    other sizes."""
    config = load_config("digits-styles")
    convs = {n: call for n, call in _calls(config).items() if isinstance(call[0], nn.Conv2d)}
    found = {"of the UNet": _walked({n.replace(".", "_"): c for n, c in convs.items()}, repeats)}
    for rows, channels, side in SIZES:
        x = torch.randn(rows, channels, side, side)
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        own = _walked({"layer": (layer, x, layer(x).detach())}, max(5, repeats // 4))
        found[f"{rows} rows, {channels} channels, {side} x {side}"] = own
    return found


def _walked(calls: dict[str, Call], repeats: int) -> dict[str, Any]:
    """What the layers cost, each on its own input."""
    import peft

    method = load_config("digits-styles").method
    rank, alpha = method.rank, method.alpha
    inputs = {  # the first layer's input needs no gradient
        name: (x.clone().requires_grad_(name != "conv_in"), torch.randn_like(y))
        for name, (_, x, y) in calls.items()
    }

    def layers() -> nn.ModuleDict:
        modules = {name: copy.deepcopy(module) for name, (module, _, _) in calls.items()}
        return nn.ModuleDict(modules).train()

    def walk(model: nn.Module) -> None:
        for name, (x, g) in inputs.items():
            layer = model.get_submodule(name)
            wanted = [each for each in (x, *layer.parameters()) if each.requires_grad]
            torch.autograd.grad(layer(x), wanted, g)

    full, ours = layers(), layers()
    adapters.attach(ours, adapters.LoRAConfig(rank=rank, alpha=alpha, targets=list(calls)), "a")
    settings = peft.LoraConfig(r=rank, lora_alpha=round(alpha), target_modules=list(calls))
    # its hint asks for transformers' models; it takes any module
    theirs: Any = peft.get_peft_model(layers(), settings)  # pyright: ignore[reportArgumentType]

    def walk_ours() -> None:
        with adapters.use(ours, "a"):
            walk(ours)

    kinds: dict[str, Callable[[], Any]] = {
        "full": lambda: walk(full),
        "ours": walk_ours,
        "peft": lambda: walk(theirs.base_model.model),
    }
    return _compared(_in_turns(kinds, repeats), calls, rank)


def _trainable(config: RunConfig, method: MethodSection) -> Trainable:
    denoiser = BaseRecipe().build()
    task = DenoisingTask(denoiser.scheduler)
    return prepare(denoiser.unet, method, config.training, task=task)


def _peft_step(config: RunConfig, rows: Sequence[ImageRow]) -> Callable[[], float]:
    """PEFT's own layers under the same loss, clipping and optimiser."""
    import peft

    method, training, denoiser = config.method, config.training, BaseRecipe().build()
    settings = peft.LoraConfig(
        r=method.rank, lora_alpha=round(method.alpha), target_modules=list(method.targets)
    )
    model: Any = peft.get_peft_model(denoiser.unet, settings)
    objective = DenoisingTask(denoiser.scheduler)(model.base_model.model, None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, fused=True)
    model.train()

    def step() -> float:
        loss = objective.nll_sum(rows) / len(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _in_turns(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each; two untimed rounds first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, act in steps.items():
            began = time.perf_counter()
            act()
            if turn > 1:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cached", action="store_true", help="use the base in the user's cache")
    parser.add_argument("--step-only", action="store_true", help="measure the step alone")
    parser.add_argument("--repeats", type=int, default=25, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="a new folder; without it a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
