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


def served(batched: bool = True) -> Any:
    specs = (
        TensorSpec(name="values", dtype="float32", shape=(None, 3)),
        TensorSpec(name="length", dtype="int64", shape=(None,)),
    )
    return FakeModel(batched=batched, bundle=SimpleNamespace(inputs=specs))


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


def cached(request: pb.ModelInferRequest, rows: tuple[np.ndarray, ...], model: Any, **options: Any) -> RequestCache:
    cache = RequestCache()
    data = request.SerializeToString()
    cache.add(data, request, InferOptions("series", (), **options), 0, model, rows)
    return cache


@pytest.mark.parametrize("turned", [False, True], ids=["in the model's order", "in another order"])
def test_other_numbers_are_read_from_the_request_itself(turned: bool) -> None:
    model = served()
    cache = cached(message(*arrays(0), turned=turned), arrays(0), model)
    found = cache.find(message(*arrays(1), turned=turned).SerializeToString())
    assert found is not None
    assert found.template.model() is model
    for got, expected in zip(found.rows, arrays(1), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


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


def test_requests_of_models_without_batches_are_not_cached() -> None:
    rows = arrays(0)
    assert cached(message(*rows), rows, served(batched=False)).find(message(*rows).SerializeToString()) is None


def test_requests_with_bools_are_not_cached() -> None:
    """Not every byte is a valid bool, so every request must be checked."""
    spec = TensorSpec(name="x", dtype="bool", shape=(None, 3))
    model, values = FakeModel(batched=True, bundle=SimpleNamespace(inputs=(spec,))), np.ones((1, 3), bool)
    request = pb.ModelInferRequest(model_name="series", raw_input_contents=[values.tobytes()])
    request.inputs.add(name="x", datatype="BOOL", shape=values.shape)
    assert cached(request, (values,), model).find(request.SerializeToString()) is None


@pytest.mark.parametrize("version", ["", "3"])
@pytest.mark.parametrize("first", ["", "7"])
def test_each_request_keeps_its_own_id(first: str, version: str) -> None:
    cache = cached(message(*arrays(0), id=first, model_version=version), arrays(0), served())
    for identity in ("", "8", "a longer one", "ñ"):
        found = cache.find(message(*arrays(1), id=identity, model_version=version).SerializeToString())
        assert found is not None
        assert found.identity == identity
        for got, expected in zip(found.rows, arrays(1), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert cache.find(message(*arrays(1), id="x" * 200, model_version=version).SerializeToString()) is None


def test_a_small_message_matches_with_any_numbers() -> None:
    """One input with a short name and no requested outputs: the numbers begin early."""
    model: Any = FakeModel(
        batched=True, bundle=SimpleNamespace(inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3)),))
    )
    cache = RequestCache()
    for seed in range(5):
        (values, _), request = arrays(seed), pb.ModelInferRequest(model_name="m", id=str(seed))
        request.inputs.add(name="x", datatype="FP32", shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
        data = request.SerializeToString()
        assert (cache.find(data) is not None) == (seed > 0)
        cache.add(data, request, InferOptions("m", ()), 0, model, (values,))
    assert len(cache._templates) == 1


def test_a_message_with_two_ids_is_not_cached() -> None:
    rows = arrays(0)
    twice = message(*rows, id="7").SerializeToString().replace(b"\x1a\x017", b"\x1a\x017\x1a\x017")
    parsed = pb.ModelInferRequest.FromString(twice)
    assert parsed.id == "7"
    cache = RequestCache()
    cache.add(twice, parsed, InferOptions("series", ()), 0, served(), rows)
    assert cache.find(twice) is None


def test_the_cache_is_bounded() -> None:
    rows, model = arrays(0), served()
    long = message(*rows, parameters={"x" * 5000: pb.InferParameter(bool_param=True)})
    assert cached(long, rows, model).find(long.SerializeToString()) is None
    cache = RequestCache()
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
