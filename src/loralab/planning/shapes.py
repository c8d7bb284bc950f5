"""What operators give for which shapes, remembered: a fake tensor's own way is ten times slower.

The result of an operator on tensors without numbers follows from its arguments' shapes, strides,
offsets and types. Blocks that repeat, and plans after the first, ask for the same again and again.
`FakeTensorMode` remembers too, but takes most of a millisecond to look; here only what is common
in training steps is served (plain tensors and plain values), and the rest goes its way.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MOST_REMEMBERED = 200_000
"""Entries; a step of a model with three blocks has about a thousand."""

_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout}
_PLAIN.add(torch.memory_format)
_CPU = torch.device("cpu")
_NOT_SERVED = object()  # a key that does not stand for its result
_known: dict[Any, Any] = {}


@no_type_check
def result_of(func: Any, args: Any, kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """`func(*args, **kwargs)` under `mode`, or the same made from what was remembered."""
    tensors: list[Tensor] = []
    key = [func]
    if not (_note(args, key, tensors) and (not kwargs or _note(kwargs, key, tensors))):
        return func(*args, **kwargs)
    found = tuple(key)
    recipe = _known.get(found)
    if recipe is None:
        result = func(*args, **kwargs)
        if len(_known) >= MOST_REMEMBERED:
            _known.clear()
        _known[found] = _recipe(func, result, tensors)
        return result
    if recipe is _NOT_SERVED:
        return func(*args, **kwargs)
    with torch._C._DisableTorchDispatch():
        return recipe(tensors, mode)


@no_type_check
def _note(value: Any, key: list[Any], tensors: list[Tensor]) -> bool:
    """Whether `value` is plain throughout; it is added to the key, its tensors to the list."""
    kind = type(value)
    if kind in _PLAIN:
        key.append(kind)  # 1, 1.0 and True are equal
        key.append(value)
        return True
    if kind is FakeTensor:
        if value.constant is not None or value.fake_device != _CPU:
            return False
        key += (value.shape, value.stride(), value.storage_offset(), value.dtype)
        tensors.append(value)
        return True
    if kind is tuple or kind is list:
        key.append(len(value))
        return all(_note(item, key, tensors) for item in value)
    if kind is dict:
        return all(
            _note(name, key, tensors) and _note(v, key, tensors) for name, v in value.items()
        )
    return False


@no_type_check
def _recipe(func: Any, result: Any, tensors: list[Tensor]) -> Any:
    """What makes the result again from tensors of the same shapes."""
    if torch.Tag.inplace_view in func.tags or func._schema.name in _RESIZING:
        return _NOT_SERVED
    kind = type(result)
    if kind is not tuple and kind is not list:
        return _recipe_of_one(result, tensors) or _NOT_SERVED
    each = [_recipe_of_one(item, tensors) for item in result]
    fresh = [_storage(t) for t in result if isinstance(t, Tensor)]
    given = {_storage(t) for t in tensors}
    fresh = [storage for storage in fresh if storage not in given]
    if None in each or len(set(fresh)) < len(fresh):  # results that share a new storage
        return _NOT_SERVED
    return lambda tensors, mode: kind(make(tensors, mode) for make in each)


_RESIZING = {"aten::resize_", "aten::set_", "aten::resize_as_"}


@no_type_check
def _recipe_of_one(result: Any, tensors: list[Tensor]) -> Any:
    if type(result) in _PLAIN:
        return lambda tensors, mode: result
    if type(result) is not FakeTensor or result.constant is not None or result.fake_device != _CPU:
        return None
    if result.layout != torch.strided:
        return None
    for index, given in enumerate(tensors):
        if given is result:
            return lambda tensors, mode, index=index: tensors[index]
    for index, given in enumerate(tensors):
        if _storage(given) == _storage(result):
            return _View(index, result)
    return _Fresh.of(result)


class _View:
    """Makes a view of one of the arguments."""

    def __init__(self, index: int, like: Tensor) -> None:
        self._index = index
        self._dtype = like.dtype
        self._layout = like.storage_offset(), like.shape, like.stride()

    @no_type_check
    def __call__(self, tensors: list[Tensor], mode: FakeTensorMode) -> FakeTensor:
        bare = torch.empty(0, dtype=self._dtype, device="meta")
        bare.set_(tensors[self._index].untyped_storage(), *self._layout)
        return FakeTensor(mode, bare, _CPU)


class _Fresh:
    """Makes a tensor with a storage of its own."""

    def __init__(self, like: Tensor) -> None:
        self._dtype = like.dtype
        self._layout = like.shape, like.stride()

    @classmethod
    def of(cls, like: Tensor) -> "_Fresh | None":
        """None where the storage is larger than the tensor."""
        made = cls(like)
        with torch._C._DisableTorchDispatch():
            num_bytes = made._bare().untyped_storage().nbytes()
        return made if num_bytes == like.untyped_storage().nbytes() else None

    @no_type_check
    def __call__(self, tensors: list[Tensor], mode: FakeTensorMode) -> FakeTensor:
        return FakeTensor(mode, self._bare(), _CPU)

    @no_type_check
    def _bare(self) -> Tensor:
        return torch.empty_strided(*self._layout, dtype=self._dtype, device="meta")


@no_type_check
def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
