"""Tensors of the Open Inference Protocol, read strictly and written as stock clients read them.

Pure: bytes in, bytes out. Nothing is repaired: a length, shape, kind or character that is not right is refused, and the
message says which tensor and what would be right. Little-endian and row-major; an element of BYTES has its length in
four bytes before it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from services.runtime.errors import TensorInvalid, UnknownField

BYTES, UINT8 = "BYTES", "UINT8"
LENGTH = struct.Struct("<I")
ANY = -1  # a side of a shape that may have any length


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor that a model takes or gives; `ANY` stands for a side of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    most: int = 1  # elements of the first side
    others: Mapping[str, tuple[int, ...]] | None = None  # further datatypes that are taken, and their shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every datatype that is taken, with its shape."""
        return {self.datatype: self.shape, **(self.others or {})}


@dataclass(frozen=True)
class Tensor:
    """A checked tensor. `elements` are those of BYTES; of UINT8 there is one, which holds all of the data."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[bytes, ...]

    def texts(self) -> tuple[str, ...]:
        """The elements as text. Raises TensorInvalid."""
        return tuple(_text(self.name, number, element) for number, element in enumerate(self.elements))

    def rows(self) -> tuple[bytes, ...]:
        """The data of each index of the first side: pictures of a batch of pixels, or the elements of BYTES."""
        if self.datatype == BYTES:
            return self.elements
        size = math.prod(self.shape[1:])
        return tuple(self.elements[0][row * size : (row + 1) * size] for row in range(self.shape[0]))


def read_inputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The inputs of a request by name; an optional one that is absent is absent here too.

    Data may be raw or typed, for all inputs alike. Raises TensorInvalid, or UnknownField for a name no input has.
    """
    known = {spec.name: spec for spec in specs}
    raw = request.raw_input_contents
    for tensor in request.inputs:
        if tensor.name not in known:
            raise UnknownField(
                f"inputs: none is called {tensor.name[:100]!r}; this model takes {', '.join(known)}",
                field=tensor.name[:100] or "inputs",
            )
        for parameter in tensor.parameters:
            why = "shared memory is not offered: send the data" if parameter.startswith("shared_memory") else "unknown"
            raise _invalid(tensor.name, f"its parameter {parameter[:100]!r}: {why}")
    if raw and any(tensor.HasField("contents") for tensor in request.inputs):
        mixed = next(tensor.name for tensor in request.inputs if tensor.HasField("contents"))
        raise _invalid(mixed, "its data is typed, and the request has raw data too: send either")
    if raw and len(raw) != len(request.inputs):
        raise TensorInvalid(
            f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs; each needs one",
            field="raw_input_contents",
        )
    tensors: dict[str, Tensor] = {}
    for number, tensor in enumerate(request.inputs):
        if tensor.name in tensors:
            raise _invalid(tensor.name, "it is there twice")
        tensors[tensor.name] = _read(tensor, raw[number] if raw else None, known[tensor.name])
    for spec in specs:
        if spec.name not in tensors and not spec.optional:
            raise _invalid(spec.name, "it is missing")
    return tensors


def read_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec], default: str) -> tuple[str, ...]:
    """Names of the outputs asked for, in that order; `default` if none is. Raises UnknownField, TensorInvalid."""
    known = [spec.name for spec in specs]
    wanted: list[str] = []
    for output in request.outputs:
        if output.name not in known:
            raise UnknownField(
                f"outputs: none is called {output.name[:100]!r}; this model gives {', '.join(known)}",
                field=output.name[:100] or "outputs",
            )
        if output.name in wanted:
            raise _invalid(output.name, "it is asked for twice")
        for parameter in output.parameters:
            raise _invalid(output.name, f"its parameter {parameter[:100]!r} is not offered")
        wanted.append(output.name)
    return tuple(wanted) or (default,)


def add_output(
    response: pb.ModelInferResponse, name: str, datatype: str, shape: Sequence[int], elements: Sequence[bytes]
) -> None:
    """Adds an output as raw data: stock clients do not read typed data of most kinds."""
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(encode_bytes(elements) if datatype == BYTES else b"".join(elements))


def encode_bytes(elements: Sequence[bytes]) -> bytes:
    """The raw form of a BYTES tensor."""
    return b"".join(part for element in elements for part in (LENGTH.pack(len(element)), element))


def decode_bytes(name: str, raw: bytes, count: int) -> tuple[bytes, ...]:
    """The `count` elements of a raw BYTES tensor. Raises TensorInvalid."""
    elements: list[bytes] = []
    place = 0
    for number in range(count):
        if place + LENGTH.size > len(raw):
            raise _invalid(name, f"its raw data ends after {number} of {count} elements")
        (size,) = LENGTH.unpack_from(raw, place)
        place += LENGTH.size
        if place + size > len(raw):
            raise _invalid(name, f"element {number} claims {size} bytes and {len(raw) - place} are left")
        elements.append(raw[place : place + size])
        place += size
    if place != len(raw):
        raise _invalid(name, f"{len(raw) - place} bytes follow its {count} elements")
    return tuple(elements)


def _read(tensor: Any, raw: bytes | None, spec: TensorSpec) -> Tensor:
    shapes = spec.shapes()
    if tensor.datatype not in shapes:
        raise _invalid(spec.name, f"its datatype is {tensor.datatype[:20]!r}; it must be {' or '.join(shapes)}")
    shape, expected = tuple(tensor.shape), shapes[tensor.datatype]
    # Sides are compared before anything is multiplied or allocated.
    fits = len(shape) == len(expected) and all(
        side >= 0 and wanted in (ANY, side) for side, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        raise _invalid(spec.name, f"its shape is {_shown(shape)}; {tensor.datatype} must be {_shown(expected)}")
    if shape[0] > spec.most:
        raise _invalid(spec.name, f"it has {shape[0]} elements; at most {spec.most} are taken")
    count = math.prod(shape)
    if raw is None:
        elements = _typed(tensor, count, spec.name)
    elif tensor.datatype == BYTES:
        elements = decode_bytes(spec.name, raw, count)
    else:
        elements = (raw,)
    if tensor.datatype == UINT8 and len(elements[0]) != count:
        raise _invalid(spec.name, f"its shape {_shown(shape)} needs {count} bytes and {len(elements[0])} came")
    return Tensor(spec.name, tensor.datatype, shape, elements)


def _typed(tensor: Any, count: int, name: str) -> tuple[bytes, ...]:
    """The data of a tensor that came in a field of its own kind."""
    wanted = "bytes_contents" if tensor.datatype == BYTES else "uint_contents"
    for field, _ in tensor.contents.ListFields():
        if field.name != wanted:
            raise _invalid(name, f"its data is in {field.name}; {tensor.datatype} belongs into {wanted}")
    values = getattr(tensor.contents, wanted)
    if len(values) != count:
        raise _invalid(name, f"its shape needs {count} values and {len(values)} came")
    if tensor.datatype == BYTES:
        return tuple(values)
    try:
        return (bytes(values),)
    except ValueError:
        raise _invalid(name, f"{max(values)} is no UINT8") from None


def _text(name: str, number: int, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise _invalid(name, f"element {number} is not UTF-8 (byte {error.start})") from None


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(side) for side in shape[:8])}{', …' if len(shape) > 8 else ''}]"


def _invalid(name: str, what: str) -> TensorInvalid:
    return TensorInvalid(f"{name}: {what}", field=name)
