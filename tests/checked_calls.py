"""Types and shapes of every call into loralab are checked, each once.

jaxtyping's import hook decorates every function. Its own decorator binds the arguments of every
call and checks them twice, where no shape is spoken of, too: that took more than half of the
suite's time. The one here leaves functions without shapes to beartype alone, and checks the others
once, in a scope of jaxtyping's, where axes of one name have one size.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

_check = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def install() -> None:
    """For modules that are imported from now on."""
    jaxtyping.jaxtyped = _decorator


def _decorator(*, typechecker: object) -> Callable[[Any], Any]:
    """What the import hook writes above every function and class."""
    return _checked


def _checked(thing: Any) -> Any:
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = _checked(thing.__init__)
        return thing
    hints = [part for hint in thing.__annotations__.values() for part in _parts(hint)]
    if inspect.isgeneratorfunction(thing) or any(isinstance(h, str | ForwardRef) for h in hints):
        return jaxtyped(thing, typechecker=beartype)  # which knows what of these to leave out
    checked = _check(thing)
    if not any(inspect.isclass(hint) and issubclass(hint, AbstractArray) for hint in hints):
        return checked

    @functools.wraps(thing)
    def in_scope(*arguments: Any, **named: Any) -> Any:
        with jaxtyped("context"):
            return checked(*arguments, **named)

    return in_scope


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    if get_origin(hint) is Literal:
        return
    for part in hint if isinstance(hint, list) else get_args(hint):
        yield from _parts(part)
