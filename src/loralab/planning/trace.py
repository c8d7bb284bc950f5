"""Watching a training step without computing it: which storage is born when, how large, why.

Tensors of weights, activations and gradients are fake (shapes without numbers, `FakeTensorMode`).
What follows from the batch alone (ids, masks, labels, positions) is small, and stays real, so that
code which asks "is there any padding?" or "how many targets?" gets the true answer.

What runs at every operation is marked `no_type_check`: checks of types at run time, as the tests
do them, would take most of the time.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from loralab.errors import LoralabError, UntraceableError
from loralab.planning.facts import Rules
from loralab.planning.shapes import result_of
from loralab.planning.timeline import Block, Place, Timeline

REAL_NUMBERS = 1 << 20
"""Tensors that follow from the batch alone stay real up to so many numbers."""

_OUTSIDE = Place()
_AUTOGRAD: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_ASK_DEVICE = torch.ops.prim.device.default
_ASK_VALUE = torch.ops.aten._local_scalar_dense.default


class Tracer(TorchDispatchMode):
    """Records every storage that is allocated inside, and when it is freed.

    `rules` are the facts of the device that is planned for. Use as a context; `label` what is
    known beforehand (weights), run the step, then take `timeline()`.
    """

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake.cache_enabled = False  # `result_of` remembers
        self._rules = rules
        self._live: dict[int, Block] = {}
        self._blocks: list[Block] = []
        self._clock = 0
        self._moments: list[tuple[int, str, Place, str]] = []
        self._moment: tuple[str, Place, str] | None = None
        self._flops = 0
        self._num_ops = 0
        self._start = 0
        self._is_optimising = False
        self._has_gradients = False
        self._places: dict[int, Place] = {}
        self._stack: list[Place] = []
        self._marks: list[int] = [0]
        self._marked: list[Place] = [_OUTSIDE]
        self._op = ""

    # the world --------------------------------------------------------------------------------

    @contextmanager
    def world(self, places: dict[int, Place]) -> Iterator[None]:
        """The context in which a step is traced; `places` says where modules (by id) stand."""
        self._places = places
        with ExitStack() as stack:
            for handle in (
                module_hooks.register_module_forward_pre_hook(self._enter_module),
                module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
                register_optimizer_step_pre_hook(self._enter_optimiser),
                register_optimizer_step_post_hook(self._leave_optimiser),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self.fake)
            stack.enter_context(self)
            stack.enter_context(self._rules)
            yield

    @contextmanager
    def building(self) -> Iterator[None]:
        """The context in which what outlives a step is made: the optimiser's state."""
        with self.fake, self:
            yield

    def stand_in(self, tensor: Tensor) -> Tensor:
        """A fake tensor in the place of a weight or buffer; whole numbers become real zeros."""
        if not tensor.is_floating_point() and tensor.numel() <= REAL_NUMBERS:
            with unset_fake_temporarily():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
        with self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made

    @property
    def last_operator(self) -> str:
        """The operator that ran last."""
        return self._op or "nothing"

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Give the storages of `tensors` a kind, unless they have one; unknown ones are added."""
        for tensor in tensors:
            if tensor is None:
                continue
            block = self._live.get(_key(tensor)) or self._born(tensor)
            if block is not None and not block.kind:
                block.kind = kind

    def begin(self) -> None:
        """What is recorded from here on is the step that counts."""
        self._start = self._clock
        self._flops = self._num_ops = 0
        self._moment = None
        self._moments.clear()
        self._has_gradients = False

    def timeline(self) -> Timeline:
        """All that was recorded."""
        return Timeline(
            blocks=self._blocks,
            moments=list(self._moments),
            start=self._start,
            end=self._clock,
            flops=self._flops,
            num_ops=self._num_ops,
        )

    # what torch tells ---------------------------------------------------------------------------

    @no_type_check
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ASK_DEVICE and isinstance(args[0], FakeTensor):  # two of three calls
            return args[0].fake_device
        if func is _ASK_VALUE and isinstance(args[0], FakeTensor):
            return _plausible(args[0].dtype)
        self._op = func.__name__
        on_host = kwargs.pop("pin_memory", None)  # whoever pins wants the host's memory
        with torch._C.DisableTorchFunction():  # the rules' turn is over, and every `.shape` asks
            result = self._run(func, args, kwargs)
        phase, place = self._now()
        self._note_moment(phase, place)
        for tensor in _tensors(result):
            self._born(tensor, on_host=bool(on_host))
        self._num_ops += 1
        self._flops += _flops(func, args, kwargs, result)
        workspace = self._rules.workspace_bytes(func, args, kwargs, result)
        if workspace:
            self._passing(workspace)
        return result

    @no_type_check
    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = list(_tensors((args, kwargs)))
        has_fake = any(type(t) is FakeTensor or isinstance(t, FakeTensor) for t in given)
        try:
            if not given and self._is_whole(func, kwargs):
                return self._really(func, args, kwargs)
            if has_fake or not given:
                return result_of(func, args, kwargs, self.fake)
            # Only real tensors: known from the batch. Run for the size first, then in earnest.
            if all(t.numel() <= REAL_NUMBERS for t in given) and not _is_random(func):
                result = self._really(func, args, kwargs)
                if all(t.numel() <= REAL_NUMBERS for t in _tensors(result)):
                    return result
            return func(*args, **kwargs)
        except (
            UnsupportedOperatorException,
            DataDependentOutputException,
            DynamicOutputShapeException,
        ) as error:
            why = "has a result whose size or value depends on numbers that nobody has computed"
            raise untraceable(str(error.func), why) from error

    @no_type_check
    def _is_whole(self, func: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a tensor made from nothing holds small whole numbers."""
        dtype = kwargs.get("dtype")
        if _is_random(func):
            return False
        name = func._overloadpacket.__name__
        if name == "arange" and dtype is None:
            return True
        return dtype is not None and not dtype.is_floating_point and not dtype.is_complex

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _enter_module(self, module: nn.Module, _arguments: Any) -> None:
        place = self._places.get(id(module)) or (self._stack[-1] if self._stack else _OUTSIDE)
        self._stack.append(place)
        self._mark(place)

    def _leave_module(self, _module: nn.Module, _arguments: Any, _result: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._mark(self._stack[-1] if self._stack else _OUTSIDE)

    def _mark(self, place: Place) -> None:
        """Autograd nodes made from now on belong to `place`: so does their backward."""
        number = _AUTOGRAD._get_sequence_nr()
        if number == self._marks[-1]:
            self._marked[-1] = place
        else:
            self._marks.append(number)
            self._marked.append(place)
        if torch._C._current_graph_task_id() == -1:
            self._has_gradients = False  # a forward began

    def _enter_optimiser(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        self._is_optimising = True
        self._rules.choose_optimiser(optimiser)
        for parameter in _parameters(optimiser):
            self.label([parameter.grad], "gradients")
            self.label([parameter], "master weights")

    def _leave_optimiser(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimiser.state.values():
            self.label((v for v in state.values() if isinstance(v, Tensor)), "optimiser states")
        self._is_optimising = False

    # the record -----------------------------------------------------------------------------

    @no_type_check
    def _now(self) -> tuple[str, Place]:
        if torch._C._current_graph_task_id() != -1:
            self._has_gradients = True
            return "backward", self._backward_place()
        if self._is_optimising:
            return "optimiser", _OUTSIDE
        if self._has_gradients:
            return "after backward", _OUTSIDE
        return "forward", self._stack[-1] if self._stack else _OUTSIDE

    @no_type_check
    def _backward_place(self) -> Place:
        if self._stack:  # recomputation
            return self._stack[-1]
        node: Any = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else 1 << 62
        if number > 1 << 60:  # accumulates a gradient: where its operation was
            return self._moment[1] if self._moment else _OUTSIDE
        return self._marked[max(0, bisect_right(self._marks, number) - 1)]

    @no_type_check
    def _note_moment(self, phase: str, place: Place) -> None:
        # Inside blocks the block is fine enough; outside, each operation is told apart.
        moment = (phase, place, "" if place.block is not None else self._op)
        if moment != self._moment:
            self._moment = moment
            self._moments.append((self._clock, *moment))

    @no_type_check
    def _born(self, tensor: Tensor, *, on_host: bool = False) -> Block | None:
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return None
        block = self._add(0 if on_host else storage.nbytes())
        self._live[key] = block
        weakref.finalize(storage, self._died, key).atexit = False
        return block

    @no_type_check
    def _add(self, num_bytes: int) -> Block:
        phase, place, op = self._moment or ("setup", _OUTSIDE, "")
        block = Block(num_bytes, self._clock, phase, place, op)
        self._clock += 1
        self._blocks.append(block)
        return block

    @no_type_check
    def _died(self, key: int) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            block.died = self._clock
            block.phase_died = self._moment[0] if self._moment else "setup"
            self._clock += 1

    def _passing(self, num_bytes: int) -> None:
        """Memory that a kernel takes and gives back before it returns."""
        block = self._add(num_bytes)
        block.kind = "kernel workspaces"
        block.died = self._clock
        block.phase_died = block.phase_born
        self._clock += 1


def untraceable(operator: str, why: str) -> UntraceableError:
    """The error of a step that cannot be followed without computing it."""
    return UntraceableError(
        f"the step cannot be traced: {operator} {why}",
        "take the estimate for what it is, or measure with `loralab plan --verify`.",
    )


def trace(
    tracer: Tracer,
    step: Callable[[], object],
    places: dict[int, Place],
    *,
    before: Callable[[], object],
) -> Timeline:
    """The timeline of `step` in the tracer's world, after `before`.

    Raises `UntraceableError` that names the operator where the step cannot be traced.
    """
    with tracer.world(places):
        try:
            before()
            tracer.begin()
            step()
        except (LoralabError, MemoryError):
            raise
        except Exception as error:  # a model's own code may raise anything on tensors without data
            why = f"was the last operator before {type(error).__name__}: {error}"
            raise untraceable(tracer.last_operator, why) from error
    return tracer.timeline()


def _parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimiser.param_groups:
        yield from group["params"]


def _plausible(dtype: torch.dtype) -> float | int | bool:
    """What stands for a number nobody computed: finite, not zero, true."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


@no_type_check
def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Multiplications and additions of a matrix product; 0 of all else."""
    count = flop_registry.get(func._overloadpacket)
    if count is None and func.__name__.partition(".")[0].endswith("_"):  # in place
        count = _IN_PLACE_FLOPS.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


_IN_PLACE_FLOPS = {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}


@no_type_check
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@no_type_check
def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@no_type_check
def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
