"""The catalogue lists every model, whatever is wrong with one of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rafaga.bundle import TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.repository.versions import ModelVersion, State
from rafaga.server.services.catalog import Catalog
from rafaga.v1 import catalog_pb2 as pb


def version(name: str, tensor: str) -> ModelVersion:
    spec = TensorSpec(name=tensor, dtype="float32", shape=(None,))
    return ModelVersion(name, 1, False, state=State.READY, bundle=PlainModel(name, 1, (spec,), (spec,), 0))


def test_properties_that_cannot_be_shown_hide_no_model(caplog: pytest.LogCaptureFixture) -> None:
    entries = [version("a", "x"), version("b", "\ud800"), version("c", "x")]
    replies: list[bytes] = []
    call: Any = SimpleNamespace(request=b"", reply=replies.append)
    catalog = Catalog(SimpleNamespace(versions=entries, require_names=lambda: None))  # type: ignore[arg-type]
    catalog.list_models(call)
    models = pb.ListModelsResponse.FromString(replies[0]).models
    assert [(m.name, m.version, m.state) for m in models] == [(name, 1, pb.Model.READY) for name in "abc"]
    assert [len(m.inputs) for m in models] == [1, 0, 1]
    assert [record.__dict__["model"] for record in caplog.records] == ["b"]
