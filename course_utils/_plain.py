"""Values as text and tensors: what may travel between machines, because nothing that arrives can become code.

    text, tensors = [], []
    described = take_apart({"loss": 0.5, "weight": torch.zeros(2, 3)}, tensors)  # fits into JSON
    put_together(described, tensors, classes=())  # an equal value

None, numbers, text, tensors, lists, tuples, dicts, arrays of the module `array`, and dataclasses that the receiver
names: all else is refused. (`pickle`, in contrast, runs whatever the sender wants.)
"""

from array import array
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The value in terms of JSON; its tensors are appended to `tensors`, and only their places stay in the text.

    Raises:
        TypeError: for anything that is not one of the above.
    """
    kind = type(value)  # exactly: a subclass may hold more than its text shows
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if kind in (list, tuple):
        return {kind.__name__: [take_apart(item, tensors) for item in value]}
    if kind is dict:  # as pairs: keys of JSON's own objects would all become text
        return {"dict": [[take_apart(key, tensors), take_apart(item, tensors)] for key, item in value.items()]}
    if kind is array:
        return {"array": value.typecode, "values": value.tolist()}
    if is_dataclass(kind):
        return {
            "class": kind.__name__,
            "fields": {f.name: take_apart(getattr(value, f.name), tensors) for f in fields(kind)},
        }
    raise TypeError(
        f"{kind.__name__} cannot travel between machines: send numbers, text, tensors, or lists, tuples, dicts and "
        "dataclasses of them"
    )


def put_together(described: Any, tensors: Sequence[Tensor], classes: Collection[type]) -> Any:
    """The reverse of `take_apart`. Raises ValueError for what it has not made, or a class that is not in `classes`."""

    def again(item: Any) -> Any:
        return put_together(item, tensors, classes)

    match described:
        case None | bool() | int() | float() | str():
            return described
        case {"tensor": int(number)}:
            return tensors[number]
        case {"list": list(items)}:
            return [again(item) for item in items]
        case {"tuple": list(items)}:
            return tuple(again(item) for item in items)
        case {"dict": list(pairs)}:
            return {again(key): again(item) for key, item in pairs}
        case {"array": str(typecode), "values": list(values)}:
            return array(typecode, values)
        case {"class": str(name), "fields": dict(content)}:
            for known in classes:
                if known.__name__ == name and {f.name for f in fields(known)} == set(content):
                    return known(**{key: again(item) for key, item in content.items()})
    raise ValueError(f"{str(described)[:80]} has arrived, which is none of the values that were to come")


def spec_of(tensor: Tensor) -> list:
    """[dtype, shape], for JSON: what the receiver makes room for."""
    return [str(tensor.dtype), list(tensor.shape)]


def room_for(spec: list) -> Tensor:
    """An empty tensor. Raises ValueError for what `spec_of` has not made."""
    match spec:
        case [str(dtype), list(shape)] if dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape):
            return torch.empty(shape, dtype=DTYPES[dtype])
    raise ValueError(f"{str(spec)[:80]} has arrived, which describes no tensor")


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, (number of bytes,) uint8: of the tensor itself if it is contiguous and on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
