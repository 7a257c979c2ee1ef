"""Tensors and parameters of the inference protocol: what is read, and what is refused and how."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import InferInput, InferResult
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from services.runtime.errors import FabulaError, TensorInvalid, UnknownField, ValueOutOfRange
from services.story.inference.parameters import Parameters, put_parameters
from services.story.inference.tensors import (
    ANY,
    BYTES,
    UINT8,
    Tensor,
    TensorSpec,
    add_output,
    decode_bytes,
    encode_bytes,
    read_inputs,
    read_outputs,
)

TEXT = TensorSpec(name="TEXT", datatype=BYTES, shape=(1,))
PICTURES = TensorSpec(
    name="PICTURES", datatype=BYTES, shape=(ANY,), optional=True, most=3, others={UINT8: (ANY, ANY, ANY, 3)}
)
SPECS = (TEXT, PICTURES)


def request(*inputs: InferInput) -> pb.ModelInferRequest:
    """As the stock client makes it."""
    message = pb.ModelInferRequest()
    for each in inputs:
        message.inputs.append(each._get_tensor())
        message.raw_input_contents.append(each._get_content())
    return message


def strings(name: str, *values: bytes) -> InferInput:
    tensor = InferInput(name, [len(values)], BYTES)
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


def array(name: str, values: np.ndarray) -> InferInput:
    tensor = InferInput(name, list(values.shape), UINT8)
    tensor.set_data_from_numpy(values)
    return tensor


def raw(name: str, datatype: str, shape: list[int], data: bytes) -> pb.ModelInferRequest:
    """One input beside a good TEXT, with any data at all."""
    message = request(strings("TEXT", b"x"))
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(data)
    return message


def refusal(message: pb.ModelInferRequest) -> FabulaError:
    with pytest.raises((TensorInvalid, UnknownField)) as refused:
        read_inputs(message, SPECS)
    error: FabulaError = refused.value
    assert error.code == "INVALID_ARGUMENT"
    assert error.field_violations[0].field in error.message
    return error


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_elements_come_back_as_the_stock_client_sends_them(values: list[bytes]) -> None:
    packed = serialize_byte_tensor(np.array(values, dtype=np.object_))
    sent = packed.item() if packed.size else b""
    assert decode_bytes("T", sent, len(values)) == tuple(values)
    assert encode_bytes(values) == sent


@given(st.binary(max_size=60), st.integers(0, 6))
def test_any_bytes_are_either_read_whole_or_refused(data: bytes, count: int) -> None:
    try:
        elements = decode_bytes("T", data, count)
    except TensorInvalid:
        return
    assert encode_bytes(elements) == data
    assert len(elements) == count


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=4), st.data())
def test_a_shortened_or_lengthened_tensor_is_refused(values: list[bytes], data: st.DataObject) -> None:
    whole = encode_bytes(values)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for broken in (whole[:cut], whole + b"\0"):
        with pytest.raises(TensorInvalid):
            decode_bytes("T", broken, len(values))


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3), st.integers(0, 255))
def test_the_stock_client_reads_what_is_written(values: list[bytes], level: int) -> None:
    response = pb.ModelInferResponse()
    add_output(response, "PIXELS", UINT8, (2, 2, 3), (bytes([level]) * 12,))
    add_output(response, "TEXTS", BYTES, (len(values),), values)
    result = InferResult(response)
    assert result.as_numpy("TEXTS").tolist() == values
    assert np.array_equal(result.as_numpy("PIXELS"), np.full((2, 2, 3), level, dtype=np.uint8))


def test_raw_and_typed_inputs_are_the_same() -> None:
    pictures = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    sent = request(strings("TEXT", "häst".encode()), array("PICTURES", pictures))
    typed = pb.ModelInferRequest()
    text = typed.inputs.add(name="TEXT", datatype=BYTES, shape=[1])
    text.contents.bytes_contents.append("häst".encode())
    picture = typed.inputs.add(name="PICTURES", datatype=UINT8, shape=pictures.shape)
    picture.contents.uint_contents.extend(pictures.flatten().tolist())
    read = read_inputs(sent, SPECS)
    assert read == read_inputs(typed, SPECS)
    assert read["TEXT"].texts() == ("häst",)
    assert read["PICTURES"].rows() == tuple(row.tobytes() for row in pictures)


def test_what_is_optional_may_be_absent_or_empty() -> None:
    assert set(read_inputs(request(strings("TEXT", b"x")), SPECS)) == {"TEXT"}
    empty = read_inputs(request(strings("TEXT", b"x"), strings("PICTURES")), SPECS)
    assert empty["PICTURES"].rows() == ()


BROKEN: list[tuple[str, pb.ModelInferRequest, str]] = [
    ("no input", pb.ModelInferRequest(), "TEXT: it is missing"),
    ("another name", raw("COLOUR", BYTES, [1], b""), "takes TEXT, PICTURES"),
    ("no name", raw("", BYTES, [1], b""), "inputs: none is called ''"),
    ("twice", raw("TEXT", BYTES, [1], encode_bytes([b"y"])), "TEXT: it is there twice"),
    ("datatype", raw("PICTURES", "FP32", [1], b"1234"), "'FP32'; it must be BYTES or UINT8"),
    ("one side too many", raw("PICTURES", BYTES, [1, 1], encode_bytes([b"y"])), r"shape is \[1, 1\]"),
    ("no side", raw("PICTURES", BYTES, [], encode_bytes([b"y"])), r"shape is \[\]"),
    ("negative side", raw("PICTURES", BYTES, [-1], encode_bytes([b"y"])), r"shape is \[-1\]"),
    ("four channels", raw("PICTURES", UINT8, [1, 1, 1, 4], b"1234"), r"must be \[-1, -1, -1, 3\]"),
    ("too many", raw("PICTURES", BYTES, [4], encode_bytes([b""] * 4)), "has 4 elements; at most 3"),
    ("endless", raw("PICTURES", BYTES, [2**62], b""), "at most 3"),
    ("a vast picture", raw("PICTURES", UINT8, [1, 2**62, 2**62, 3], b"123"), "and 3 came"),
    ("too few pixels", raw("PICTURES", UINT8, [1, 2, 2, 3], bytes(11)), "needs 12 bytes and 11 came"),
    ("too many pixels", raw("PICTURES", UINT8, [1, 2, 2, 3], bytes(13)), "needs 12 bytes and 13 came"),
    (
        "a length too long",
        raw("PICTURES", BYTES, [1], struct.pack("<I", 2**32 - 1) + b"abc"),
        "claims 4294967295 bytes",
    ),
    ("a length cut off", raw("PICTURES", BYTES, [1], b"\1\0\0"), "ends after 0 of 1"),
    ("something behind", raw("PICTURES", BYTES, [1], encode_bytes([b"y"]) + b"z"), "1 bytes follow"),
]


@pytest.mark.parametrize(("message", "match"), [pytest.param(*case[1:], id=case[0]) for case in BROKEN])
def test_a_bad_tensor_is_refused_by_name(message: pb.ModelInferRequest, match: str) -> None:
    assert re.search(match, refusal(message).message)


def test_raw_and_typed_data_cannot_be_mixed() -> None:
    message = request(strings("TEXT", b"x"))
    message.inputs.add(name="PICTURES", datatype=BYTES, shape=[1]).contents.bytes_contents.append(b"y")
    assert "PICTURES: its data is typed" in refusal(message).message


def test_every_input_needs_its_raw_data() -> None:
    message = request(strings("TEXT", b"x"))
    message.inputs.add(name="PICTURES", datatype=BYTES, shape=[1])
    assert refusal(message).field_violations[0].field == "raw_input_contents"


@pytest.mark.parametrize(
    ("datatype", "shape", "field", "values", "match"),
    [
        (BYTES, [1], "uint_contents", [1], "belongs into bytes_contents"),
        (BYTES, [2], "bytes_contents", [b"y"], "needs 2 values and 1 came"),
        (BYTES, [1], "bytes_contents", [], "needs 1 values and 0 came"),
        (UINT8, [1, 1, 1, 3], "int_contents", [1, 2, 3], "belongs into uint_contents"),
        (UINT8, [1, 1, 1, 3], "uint_contents", [1, 2, 256], "256 is no UINT8"),
        (UINT8, [1, 1, 1, 3], "uint_contents", [1, 2], "needs 3 values and 2 came"),
    ],
)
def test_bad_typed_data_is_refused(datatype: str, shape: list[int], field: str, values: list[Any], match: str) -> None:
    message = pb.ModelInferRequest()
    message.inputs.add(name="TEXT", datatype=BYTES, shape=[1]).contents.bytes_contents.append(b"x")
    picture = message.inputs.add(name="PICTURES", datatype=datatype, shape=shape)
    getattr(picture.contents, field).extend(values)
    assert match in refusal(message).message


def test_shared_memory_is_refused_with_advice() -> None:
    tensor = InferInput("TEXT", [1], BYTES)
    tensor.set_shared_memory("region", 8)
    message = pb.ModelInferRequest()
    message.inputs.append(tensor._get_tensor())
    assert "shared memory is not offered: send the data" in refusal(message).message


def test_text_that_is_not_utf8_is_refused_with_its_place() -> None:
    with pytest.raises(TensorInvalid, match=r"TEXT: element 1 is not UTF-8 \(byte 2\)"):
        Tensor("TEXT", BYTES, (2,), (b"fine", b"ab\xff")).texts()


def test_outputs_are_those_asked_for() -> None:
    message = pb.ModelInferRequest()
    assert read_outputs(message, SPECS, "TEXT") == ("TEXT",)
    message.outputs.add(name="PICTURES")
    assert read_outputs(message, SPECS, "TEXT") == ("PICTURES",)
    message.outputs.add(name="PICTURES")
    with pytest.raises(TensorInvalid, match="asked for twice"):
        read_outputs(message, SPECS, "TEXT")
    unknown = pb.ModelInferRequest(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="SOUND")])
    with pytest.raises(UnknownField, match="gives TEXT, PICTURES"):
        read_outputs(unknown, SPECS, "TEXT")
    ranked = pb.ModelInferRequest()
    ranked.outputs.add(name="TEXT").parameters["classification"].int64_param = 3
    with pytest.raises(TensorInvalid, match="TEXT: its parameter 'classification'"):
        read_outputs(ranked, SPECS, "TEXT")


# -- parameters --------------------------------------------------------------------------------------------------------


def given_parameters(**values: Any) -> Parameters:
    message = pb.ModelInferRequest()
    put_parameters(message.parameters, values)
    return Parameters(message.parameters)


def test_parameters_are_read_by_kind() -> None:
    read = given_parameters(steps=4, guidance=2.5, whole=7, zero=-0.0, sampler="ddim", flag=True)
    assert read.integer("steps", 1, 100) == 4
    assert read.number("guidance", 0, 30) == 2.5
    assert read.number("whole", 0, 30) == 7.0
    assert str(read.number("zero", 0, 1)) == "0.0"
    assert read.text("sampler") == "ddim"
    assert read.flag("flag")
    assert read.integer("absent", 0, 1) is None
    assert read.number("absent", 0, 1) is None
    assert read.text("absent") is None
    assert read.word("absent", ("a",)) is None
    assert not read.flag("absent")
    read.finish()


def test_unsigned_numbers_are_numbers() -> None:
    message = pb.ModelInferRequest()
    message.parameters["priority"].uint64_param = 2**64 - 1
    assert Parameters(message.parameters).integer("priority", 0, 2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize(
    ("value", "method", "arguments"),
    [
        ("4", "integer", (0, 9)),
        (4.0, "integer", (0, 9)),
        (True, "integer", (0, 9)),
        (10, "integer", (0, 9)),
        (-1, "integer", (0, 9)),
        ("4", "number", (0, 9)),
        (True, "number", (0, 9)),
        (9.1, "number", (0, 9)),
        (float("nan"), "number", (0, 9)),
        (float("inf"), "number", (0, 9)),
        (4, "text", ()),
        ("x" * 256, "text", ()),
        ("c", "word", (("a", "b"),)),
        (1, "flag", ()),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(value: Any, method: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueOutOfRange, match=r"^it: ") as refused:
        getattr(given_parameters(it=value), method)("it", *arguments)
    assert refused.value.field_violations[0].field == "it"


def test_a_parameter_nobody_asks_about_is_refused() -> None:
    read = given_parameters(steps=4, stpes=5)
    read.integer("steps", 1, 100)
    with pytest.raises(UnknownField, match="'stpes'; known here: steps"):
        read.finish()


def test_a_parameter_without_a_value_is_refused() -> None:
    message = pb.ModelInferRequest()
    message.parameters["steps"].SetInParent()
    with pytest.raises(ValueOutOfRange, match="steps: it has no value"):
        Parameters(message.parameters).integer("steps", 1, 2)
