"""Bad fields are refused by name, when the config is made."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

import peanut_jax as pj


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": -3}, "r must be an integer of at least 1, got -3"),
        ({"r": 2.0}, "r must be an integer of at least 1, got 2.0"),
        ({"r": True}, "r must be an integer of at least 1, got True"),
        ({"depth": -1}, "depth must be an integer of at least 0, got -1"),
        ({"depth": 1.5}, "depth must be an integer of at least 0, got 1.5"),
        ({"scaling": 0.0}, "scaling must be a finite number above 0, got 0.0"),
        ({"scaling": -1.0}, "scaling must be a finite number above 0"),
        ({"scaling": math.nan}, "scaling must be a finite number above 0"),
        ({"scaling": math.inf}, "scaling must be a finite number above 0"),
        ({"scaling": "1"}, "scaling must be a finite number above 0"),
        ({"scaling": 1e-44}, r"scaling must be between 1.18e-38 and 3.4e\+38, the range of float32.*got 1e-44"),
        ({"scaling": 1e39}, r"scaling must be between .*got 1e\+39"),
        ({"scaling": 10**400}, "scaling must be a finite number above 0"),
        ({"r": np.bool_(True)}, "r must be an integer of at least 1"),
        ({"r": np.float32(2)}, "r must be an integer of at least 1"),
        ({"kernel_axes": {"q/kernel": 3}}, r"kernel_axes must be path -> \(inputs, outputs\)"),
        ({"act_fn": "rleu"}, r"act_fn must be one of \['elu', 'gelu'.*got 'rleu'"),
        ({"act_fn": None}, "act_fn must be one of"),
        ({"orientation": "rows"}, r"orientation must be one of \('output', 'input'\), got 'rows'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
        ({"layers_to_transform": -1}, "layers_to_transform must be an integer of at least 0, got -1"),
        ({"layers_to_transform": [0, -2]}, "layers_to_transform must be an integer of at least 0, got -2"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform must be a list of one or more int"),
        ({"layers_to_transform": []}, "layers_to_transform must be a list of one or more int"),
        ({"target_modules": []}, "target_modules must be a list of one or more str"),
        ({"target_modules": ["query", 3]}, "target_modules must be a list of one or more str"),
        ({"target_modules": "(query"}, "is a string, so a regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules is a string, so a regular expression"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names"),
        ({"task_type": "CLS"}, "task_type must be one of"),
    ],
)
def test_a_bad_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        pj.PeanutConfig(**fields)


def test_numpy_scalars_are_taken_for_what_they_are():
    fields = {"r": np.int64(4), "depth": np.uint8(1), "scaling": np.float32(0.5), "dropout": np.float64(0.25)}
    config = pj.PeanutConfig(**fields, layers_to_transform=np.arange(2))
    assert config == pj.PeanutConfig(r=4, depth=1, scaling=0.5, dropout=0.25, layers_to_transform=[0, 1])
    assert all(type(getattr(config, name)) in (int, float) for name in fields)
    assert pj.LoraConfig(layers_to_transform=np.int32(3)).layers_to_transform == 3
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (pj.LoraConfig, {"lora_alpha": 16}, r"LoraConfig has no field 'lora_alpha': set scaling = lora_alpha / r"),
        (pj.PeanutConfig, {"dept": 1}, "PeanutConfig has no field 'dept': did you mean 'depth'"),
        (pj.LoraConfig, {"orientation": "input"}, "LoraConfig has no field 'orientation'"),
    ],
)
def test_a_field_that_there_is_not(method, fields, message):
    with pytest.raises(TypeError, match=message):
        method(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "modules_to_save must name the modules to train"),
        ({"modules_to_save": ["head"], "target_modules": ["q"]}, "target_modules selects kernels"),
        ({"modules_to_save": ["head"], "dropout": 0.1}, "dropout=0.1 falls on an adapter's input"),
    ],
)
def test_a_subset_is_of_modules(fields, message):
    with pytest.raises(ValueError, match=message):
        pj.SubsetConfig(**fields)


def test_a_config_survives_copies_and_pickles():
    config = pj.DoraConfig(r=3, target_modules=["q"], kernel_axes={"q/kernel": (1, 2)})
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_defaults_are_those_of_hf_peft():
    from peft import PeanutConfig as Theirs

    ours, theirs = pj.PeanutConfig(), Theirs()
    shared = ["r", "depth", "act_fn", "scaling", "target_modules", "exclude_modules", "modules_to_save"]
    shared += ["layers_to_transform", "layers_pattern", "init_weights", "base_model_name_or_path", "task_type"]
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}


def test_layer_zero_is_a_layer():
    assert pj.PeanutConfig(layers_to_transform=0, layers_pattern="layer").layers_to_transform == 0


def test_a_config_hashes_and_does_not_change():
    one = pj.PeanutConfig(target_modules=["query", "value"], layers_to_transform=[0, 1])
    assert hash(one) == hash(pj.PeanutConfig(target_modules=("query", "value"), layers_to_transform=(0, 1)))
    assert pj.PeanutConfig(target_modules={"value", "query"}).target_modules == ("query", "value")
    with pytest.raises(AttributeError):
        one.r = 3
