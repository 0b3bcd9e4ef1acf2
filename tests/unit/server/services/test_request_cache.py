"""A request that matches a cached one has exactly the meaning that parsing it would give."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from rafaga.bundle import TensorSpec
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.services.open_inference.request_cache import InferOptions, RequestCache


class FakeModel(SimpleNamespace):
    """The part of a ServedModel that the cache uses."""


def served(*specs: tuple[str, str, tuple[int, ...]], batched: bool = True) -> Any:
    """Of inputs with a name, a dtype, and the shape of a row."""
    inputs = tuple(TensorSpec(name=name, dtype=dtype, shape=(None, *row)) for name, dtype, row in specs or SERIES)
    return FakeModel(batched=batched, bundle=SimpleNamespace(inputs=inputs))


SERIES = (("values", "float32", (3,)), ("length", "int64", ()))


def of_one(name: str, array: np.ndarray, **fields: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[array.tobytes()], **fields)
    request.inputs.add(name=name, datatype="BOOL" if array.dtype == bool else "FP32", shape=array.shape)
    return request


def message(values: np.ndarray, length: np.ndarray, turned: bool = False, **fields: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="series", **fields)
    tensors = [("values", "FP32", values), ("length", "INT64", length)]
    for name, datatype, array in reversed(tensors) if turned else tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def arrays(seed: int, rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, 3)).astype(np.float32), generator.integers(0, 3, rows)


def cached(request: pb.ModelInferRequest, rows: tuple[np.ndarray, ...], model: Any) -> RequestCache:
    cache = RequestCache()
    cache.add(request.SerializeToString(), request, InferOptions("series", ()), 0, model, rows)
    return cache


@pytest.mark.parametrize("turned", [False, True], ids=["in the model's order", "in another order"])
@pytest.mark.parametrize("version", ["", "3"])
@pytest.mark.parametrize("first", ["", "7"])
def test_each_request_keeps_its_own_numbers_and_id(first: str, version: str, turned: bool) -> None:
    model = served()
    cache = cached(message(*arrays(0), turned, id=first, model_version=version), arrays(0), model)
    for identity in ("", "8", "a longer one", "ñ"):
        found = cache.find(message(*arrays(1), turned, id=identity, model_version=version).SerializeToString())
        assert found is not None
        assert found.template.model() is model
        assert found.identity == identity
        for got, expected in zip(found.rows, arrays(1), strict=True):
            np.testing.assert_array_equal(got, expected, strict=True)
    assert cache.find(message(*arrays(1), turned, id="x" * 200, model_version=version).SerializeToString()) is None


def test_a_different_request_does_not_match() -> None:
    model = served()
    cache = cached(message(*arrays(0)), arrays(0), model)
    others = [
        message(*arrays(0, rows=3)),
        message(*arrays(0), turned=True),
        message(*arrays(0), model_version="1"),
        message(*arrays(0), parameters={"timeout": pb.InferParameter(int64_param=5)}),
    ]
    for other in others:
        assert cache.find(other.SerializeToString()) is None


def test_what_is_not_cached() -> None:
    """Requests of models without batches; of bools, because not every byte is one; with two ids; of many bytes."""
    rows, flags = arrays(0), np.ones((1, 3), bool)
    long = message(*rows, parameters={"x" * 5000: pb.InferParameter(bool_param=True)})
    for request, tensors, model in (
        (message(*rows), rows, served(batched=False)),
        (of_one("x", flags), (flags,), served(("x", "bool", (3,)))),
        (long, rows, served()),
    ):
        assert cached(request, tensors, model).find(request.SerializeToString()) is None
    twice = message(*rows, id="7").SerializeToString().replace(b"\x1a\x017", b"\x1a\x017\x1a\x017")
    parsed = pb.ModelInferRequest.FromString(twice)
    assert parsed.id == "7"
    cache = RequestCache()
    cache.add(twice, parsed, InferOptions("series", ()), 0, served(), rows)
    assert cache.find(twice) is None


def test_a_small_message_matches_with_any_numbers() -> None:
    """One input with a short name and no requested outputs: the numbers begin early."""
    model, cache = served(("x", "float32", (3,))), RequestCache()
    for seed in range(5):
        values, _ = arrays(seed)
        request = of_one("x", values, id=str(seed))
        data = request.SerializeToString()
        assert (cache.find(data) is not None) == (seed > 0)
        cache.add(data, request, InferOptions("m", ()), 0, model, (values,))
    assert len(cache._templates) == 1


def test_the_cache_is_bounded() -> None:
    rows, model, cache = arrays(0), served(), RequestCache()
    for i in range(1000):
        request = message(*rows, model_version="1" * i)
        cache.add(request.SerializeToString(), request, InferOptions("series", ()), 0, model, rows)
    assert len(cache._templates) <= 256


def test_the_cache_does_not_keep_a_model_alive() -> None:
    model = served()
    cache = cached(message(*arrays(0)), arrays(0), model)
    del model
    gc.collect()
    found = cache.find(message(*arrays(0)).SerializeToString())
    assert found is not None
    assert found.template.model() is None


@given(st.data())
def test_a_match_parses_to_the_same_message(data: st.DataObject) -> None:
    """A request is damaged at random. If it still matches, it must have the same meaning."""
    model = served()
    identity = data.draw(st.sampled_from(["", "7"]))
    original = message(*arrays(0), turned=data.draw(st.booleans()), id=identity)
    cache = cached(original, arrays(0), model)
    damaged = bytearray(original.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["change", "insert", "remove"])):
            case "change":
                damaged[at] = data.draw(st.integers(0, 255))
            case "insert":
                damaged.insert(at, data.draw(st.integers(0, 255)))
            case _:
                del damaged[at]
    request = bytes(damaged)
    found = cache.find(request)
    if found is None:
        return
    try:
        parsed = pb.ModelInferRequest.FromString(request)
    except DecodeError:
        pytest.fail("what is found must parse")
    order = {tensor.name: i for i, tensor in enumerate(parsed.inputs)}
    for spec, rows in zip(model.bundle.inputs, found.rows, strict=True):
        assert rows.tobytes() == parsed.raw_input_contents[order[spec.name]]
    assert found.identity == parsed.id
    for each in (parsed, original):
        del each.raw_input_contents[:]
        each.id = ""
    assert parsed == original
