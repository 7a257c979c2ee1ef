"""Reads files of published data sets that hold pickles, and runs nothing that stands in them.

FlintstonesSV and PororoSV are shared as pickled dictionaries and arrays of objects. A pickle may name any function and
have it called; here only those that rebuild arrays, plain containers and texts are found, and everything else is
refused by name. Knows no data set.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from training.newepisode.records import DataInvalid

_BYTES_MAX = 4 << 30
_ALLOWED = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "bytearray"),
    ("__builtin__", "set"),
    ("__builtin__", "frozenset"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _Plain(pickle.Unpickler):
    """Finds what rebuilds containers, texts and arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """What a pickle file holds, texts of Python 2 as Latin-1. Raises DataInvalid."""
    return _unpickled(_bytes(path), path)


def read_array(path: Path) -> Any:
    """The array of a `.npy` file, one of objects included. Raises DataInvalid."""
    content = io.BytesIO(_bytes(path))
    try:
        version = np.lib.format.read_magic(content)  # type: ignore[no-untyped-call]
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(content)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, EOFError) as error:
        raise DataInvalid(f"{path} is no array file: {str(error)[:80]}") from None
    if dtype.hasobject:
        held = _unpickled(content.read(), path)
        if not isinstance(held, np.ndarray) or held.shape != shape:
            raise DataInvalid(f"{path} does not hold the array that its header tells of")
        return held
    try:
        flat = np.frombuffer(content.read(), dtype=dtype, count=int(np.prod(shape, dtype=np.int64)))
    except ValueError:
        raise DataInvalid(f"{path} is shorter than its header says") from None
    return flat.reshape(shape, order="F" if is_fortran else "C")


def text_of(value: Any) -> str:
    """A text of bytes, of NumPy's bytes or of a bytes' spelling ("b'…'"), as all of them occur."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    text = str(value)
    return text[2:-1] if text[:2] in ("b'", 'b"') and text[-1:] in ("'", '"') and len(text) > 2 else text


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise DataInvalid(f"{path} is larger than {_BYTES_MAX >> 30} GiB")
        return path.read_bytes()
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror}") from None


def _unpickled(content: bytes, path: Path) -> Any:
    try:
        return _Plain(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # noqa: BLE001 - a broken pickle raises whatever it likes
        raise DataInvalid(f"{path} is no pickle of plain data: {str(error)[:120]}") from None
