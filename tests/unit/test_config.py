"""Configurations: what they refuse, and that JSON brings them back unchanged."""

import dataclasses
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest

from dynadepth.config import (
    check_fields,
    config_from_dict,
    config_to_dict,
    did_you_mean,
    plain_number,
)
from dynadepth.errors import ConfigError
from dynadepth.policies.router_heads import RouterConfig
from dynadepth.training.train_config import TrainConfig
from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Every:
    whole: int = 1
    number: float = 0.5
    flag: bool = False
    text: str = "a"
    choice: Literal["x", "y"] = "x"
    many: tuple[int, ...] = ()
    perhaps: int | None = None

    def __post_init__(self):
        check_fields(self)


def test_every_kind_of_field_survives_json():
    config = _Every(whole=3, number=2, flag=True, text="b", choice="y", many=(4, 5), perhaps=7)
    assert config_from_dict(_Every, json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_to_dict(_Every()) == {
        "whole": 1,
        "number": 0.5,
        "flag": False,
        "text": "a",
        "choice": "x",
        "many": [],
        "perhaps": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("whole", 1.0, "a whole number"),
        ("whole", True, "a whole number"),
        ("number", "1", "a finite number"),
        ("number", float("nan"), "a finite number"),
        ("number", float("inf"), "a finite number"),
        ("number", True, "a finite number"),
        ("flag", 1, "true or false"),
        ("text", None, "text"),
        ("choice", "z", "one of 'x', 'y'"),
        ("many", [1, "2"], "a list, each entry a whole number"),
        ("many", 3, "a list, each entry a whole number"),
        ("perhaps", "no", "a whole number or nothing"),
    ],
)
def test_a_wrong_type_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(_Every, {field: value})
    assert str(caught.value).startswith(f"_Every.{field} is ")
    assert str(caught.value).endswith(f"expected {expected}")


def test_an_unknown_key_suggests_the_known_one():
    with pytest.raises(
        ConfigError,
        match=r"RouterConfig has no setting 'num_window' \(did you mean 'num_windows'\?\)",
    ):
        RouterConfig.from_dict({"num_layers": 2, "hidden_size": 4, "num_window": 8})
    assert did_you_mean("entirely different", ["num_windows"]) == ""


def test_a_missing_key_and_a_thing_that_is_no_object_are_named():
    with pytest.raises(ConfigError, match="RouterConfig lacks the setting 'hidden_size'; add it"):
        RouterConfig.from_dict({"num_layers": 2})
    with pytest.raises(ConfigError, match=r"RouterConfig is \[1\]; expected an object of settings"):
        RouterConfig.from_dict([1])


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_windows", "bottleneck"])
def test_sizes_below_one_are_refused(name):
    sizes = {"num_layers": 2, "hidden_size": 4, name: 0}
    with pytest.raises(ConfigError, match=f"RouterConfig.{name} is 0; expected 1 or more"):
        RouterConfig.from_dict(sizes)


def test_configurations_cannot_be_changed():
    config = RouterConfig(num_layers=2, hidden_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3


def test_the_presets_shapes():
    ours = RouterConfig.for_preset("dynadepth", num_layers=30, hidden_size=576)
    assert (ours.num_windows, ours.bottleneck, ours.last_token, ours.num_views) == (8, 128, True, 9)
    paper = RouterConfig.for_preset("drllm", num_layers=30, hidden_size=576)
    assert (paper.num_windows, paper.bottleneck, paper.last_token, paper.num_views) == (
        8,
        128,
        False,
        8,
    )
    assert RouterConfig.from_dict(json.loads(json.dumps(paper.to_dict()))) == paper


def test_the_paper_sees_windows_only():
    with pytest.raises(
        ConfigError, match="'drllm', which sees windows only; give last_token=False"
    ):
        RouterConfig(num_layers=2, hidden_size=4, preset="drllm")


@pytest.mark.parametrize("config_class", [RouterConfig, TrainConfig])
def test_an_unknown_preset_names_the_known_ones(config_class):
    sizes = {"num_layers": 2, "hidden_size": 4} if config_class is RouterConfig else {}
    with pytest.raises(
        ConfigError,
        match=r"preset is 'drlm'; expected one of dynadepth, drllm \(did you mean 'drllm'\?\)",
    ):
        config_class.for_preset("drlm", **sizes)


def test_the_papers_recipe_has_the_papers_numbers():
    paper = TrainConfig.for_preset("drllm")
    assert paper.to_dict() == {
        "epochs": 25,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup_steps": 500,
        "focal_gamma": 2.0,
        "class_balance": 0.999,
        "standardise": False,
        "centre": False,
        "held_out": 0.0,
    }
    assert TrainConfig.from_dict(json.loads(json.dumps(paper.to_dict()))) == paper


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "1 or more"),
        ("learning_rate", 0.0, "more than 0"),
        ("class_balance", 1.0, "0 or more and less than 1"),
        ("held_out", 0.7, "0 to 0.5"),
    ],
)
def test_recipes_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ConfigError, match=f"TrainConfig.{name} is {value}; expected {expected}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers_of_other_libraries_become_pythons(given, expected):
    assert plain_number(given) == expected
    assert type(plain_number(given)) is type(expected)
    name = "whole" if isinstance(expected, int) else "number"
    config = _Every(**{name: given, "many": (np.int64(2),)})
    assert json.loads(json.dumps(config_to_dict(config)))[name] == expected
    assert type(getattr(config, name)) is type(expected)
    assert type(config.many[0]) is int


@pytest.mark.parametrize("given", [np.bool_(1), np.float32("nan"), np.float64(0.5), 1j])
def test_numbers_of_another_kind_are_refused(given):
    with pytest.raises(ConfigError, match="expected a whole number"):
        _Every(whole=given)


def test_every_configuration_takes_numpys_numbers():
    assert SearchConfig(max_evaluations=np.int64(4)).max_evaluations == 4
    assert PromptSearchSpec(seed=np.int64(4), block_size=np.uint8(4)).to_dict()["seed"] == 4
    assert json.dumps(PromptSearchSpec(block_size=np.int32(8)).to_dict())
