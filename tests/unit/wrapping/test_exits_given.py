"""What `wrap_model` makes of exits beside other settings."""

import pytest

from dynadepth import unwrap_model, wrap_model
from dynadepth.errors import ConfigError
from tests.tiny import tiny_model
from tests.tiny_exits import random_exits


@pytest.mark.parametrize("promise", [{"budget": 0.8}, {"fidelity": 0.9}, {"fidelity": 1.0}])
def test_protected_layers_run_anyway(promise: dict[str, float]) -> None:
    model = tiny_model("llama")
    wrap_model(model, routers=random_exits(model), protect=[1, 3], **promise)
    assert model.dynadepth.budget == promise.get("budget")
    unwrap_model(model)


def test_protected_layers_have_to_exist() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="protect names layer 4"):
        wrap_model(model, routers=random_exits(model), budget=0.8, protect=[4])
