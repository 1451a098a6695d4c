"""Fields of a transformers config.json that no model has: one error each, before anything is built from them."""

import json
import time

import pytest
from transformers import CONFIG_MAPPING, BertConfig, ResNetConfig

from peanut_jax.models import hf
from peanut_jax.models.hf_fields import check_fields


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (BertConfig, {"hidden_size": 10**300}, "hidden_size must be a finite number"),
        (BertConfig, {"hidden_size": 2**31}, "hidden_size must be at most"),
        (BertConfig, {"hidden_size": None}, "cannot make a model of its fields"),
        (BertConfig, {"num_attention_heads": 0}, "ZeroDivisionError"),
        (BertConfig, {"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 1000"),
        (BertConfig, {"num_hidden_layers": "12"}, "num_hidden_layers must be a finite number, such as 12"),
        (BertConfig, {"num_labels": 2**31}, "num_labels must be at most"),
        (BertConfig, {"id2label": ["a"]}, "id2label|fields"),
        (BertConfig, {"hidden_act": "nope"}, "hidden_act|KeyError"),
        (BertConfig, {"torch_dtype": "nope"}, "AttributeError"),
        (BertConfig, {"initializer_range": float("nan")}, "initializer_range must be a finite number"),
        (BertConfig, {"model_type": "x" * 10**6}, "model_type 'xxx.* is unknown"),
        (BertConfig, {"model_type": ["bert"]}, "model_type must be a string"),
        (ResNetConfig, {"depths": [2**40, 1, 1, 1]}, "depths must be at most 1000"),
    ],
)
def test_fields_of_strangers(tmp_path, config, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config().to_json_string(use_diff=False)) | fields))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        hf.shapes(tmp_path, "base")
    assert time.perf_counter() - began < 10
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


@pytest.mark.large
def test_defaults_pass():
    """What transformers itself writes is taken, of every architecture that has a Flax class."""
    offers = hf._offers(hf._transformers()).values()
    classes = {config_class for offer in offers for config_class in offer if not config_class.has_no_defaults_at_init}
    assert len(classes) > 30
    assert classes <= set(CONFIG_MAPPING.values())
    for config_class in classes - {CONFIG_MAPPING["vision-text-dual-encoder"]}:
        config = config_class()
        check_fields(json.loads(config.to_json_string(use_diff=False)), config.to_dict())
