"""AdamW over fp32 masters, with gradients that arrive in fp32 as soon as they are complete.

A bf16 weight has 8 significant bits: an AdamW step smaller than 1/256 of the weight is rounded
away, which at the rates of full fine-tuning is most steps. So the optimiser keeps an fp32 master
of every half-precision parameter and the model gets its rounding. It costs 18 bytes a parameter
(2 weight, 4 master, 8 moments, and 4 of gradient in the place of 2) against 8 in pure bf16, and
the same as training in fp32. `training.master_weights = false` gives the pure kind.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.hooks import RemovableHandle

from loralab.config import TrainingSection
from loralab.placement import device_kind
from loralab.training.methods import ParameterGroup

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
HEEDING_DEVICES = {"cpu", "cuda"}
"""Whose fused AdamW looks at `found_inf` before it moves anything; on MPS it moves regardless."""


class Optimiser:
    """One AdamW for all groups of a `Trainable`; learning rates by role, clipping, whole state."""

    def __init__(self, groups: Sequence[ParameterGroup], training: TrainingSection) -> None:
        self._groups = tuple(groups)
        self._max_grad_norm = training.max_grad_norm
        self._parameters = {n: p for group in groups for n, p in group.parameters.items()}
        self._masters = {
            name: _master(parameter, training.master_weights)
            for name, parameter in self._parameters.items()
        }
        handles = [
            _send_gradient_to_master(parameter, self._masters[name])
            for name, parameter in self._parameters.items()
            if self._masters[name] is not parameter
        ]
        # An optimiser that is dropped unclosed must not go on taking the model's gradients.
        self._unhook = weakref.finalize(self, _remove, handles)
        device = next(iter(self._masters.values())).device
        self._fused = training.fused and device_kind(device) in FUSED_DEVICES
        self._halted = torch.zeros((), dtype=torch.float32, device=device)
        self._heeds = self._fused and device_kind(device) in HEEDING_DEVICES
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [self._masters[name] for name in group.parameters],
                    "lr": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            fused=self._fused,
        )
        self._create_state()
        if self._heeds:  # set as torch.amp.GradScaler does
            self._adamw.found_inf = self._halted  # pyright: ignore[reportAttributeAccessIssue]

    def gradients(self) -> dict[str, Tensor | None]:
        """The present gradient of every parameter, None where none arrived."""
        return {name: master.grad for name, master in self._masters.items()}

    def grad_norm(self) -> Float[Tensor, ""]:
        """The 2-norm of all gradients together, before clipping."""
        return get_total_norm([g for g in self.gradients().values() if g is not None])

    def halt_unless(self, finite: Bool[Tensor, ""]) -> None:
        """Unless `finite`, this step and all that follow move nothing: neither weights nor state.

        The device decides it, so nobody waits for it.
        """
        self._halted.masked_fill_(~finite.to(self._halted.device), 1.0)

    def step(self, factor: float, grad_norm: Float[Tensor, ""]) -> dict[str, float]:
        """Clip, step with every rate times `factor`, round into the model, clear the gradients.

        Returns the learning rates used, by role.
        """
        if self._max_grad_norm:
            clip_grads_with_norm_(self._masters.values(), self._max_grad_norm, grad_norm)
        rates: dict[str, float] = {}
        for group, table in zip(self._groups, self._adamw.param_groups, strict=True):
            rates[group.role] = table["lr"] = group.learning_rate * factor
        if self._heeds or not self._halted.item():
            self._adamw.step()
        self.clear()
        self._round_into_model()
        return rates

    def clear(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def trained(self) -> dict[str, Tensor]:
        """The trained values (the masters, where there are any), by parameter name, not copied."""
        return {name: master.detach() for name, master in self._masters.items()}

    def set_trained(self, values: Mapping[str, Tensor]) -> None:
        """Copy `values` into the existing tensors of the optimiser and of the model."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(values[name])
        self._round_into_model()

    def state(self) -> dict[str, Tensor]:
        """AdamW's state under flat names, not copied."""
        tensors: dict[str, Tensor] = {}
        steps = []
        for name, master in self._masters.items():
            state = self._adamw.state[master]
            tensors[f"exp_avg/{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
            steps.append(state["step"])
        return {**tensors, "steps": torch.stack(steps)}

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `state` returned into the existing tensors, whose layout decides the bits."""
        for index, (name, master) in enumerate(self._masters.items()):
            state = self._adamw.state[master]
            state["exp_avg"].copy_(tensors[f"exp_avg/{name}"])
            state["exp_avg_sq"].copy_(tensors[f"exp_avg_sq/{name}"])
            state["step"].copy_(tensors["steps"][index])

    def close(self) -> None:
        """Take the hooks off the model and drop the gradients."""
        self._unhook()
        self.clear()

    def _create_state(self) -> None:
        """What AdamW makes at its first step, made now: a resumed run has the same tensors."""
        for master in self._masters.values():
            device = master.device if self._fused else torch.device("cpu")
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }

    def _round_into_model(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])


def _send_gradient_to_master(parameter: nn.Parameter, master: Tensor) -> RemovableHandle:
    def send(source: Tensor) -> None:
        if source.grad is None:
            return
        if master.grad is None:
            master.grad = source.grad.to(master.dtype)
        else:
            master.grad.add_(source.grad)
        source.grad = None

    return parameter.register_post_accumulate_grad_hook(send)


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _master(parameter: nn.Parameter, wanted: bool) -> Tensor:
    if not wanted or parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().to(torch.float32, copy=True)
