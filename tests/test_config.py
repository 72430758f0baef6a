import dataclasses
import json

import pytest

from afl_jax.config import Config, DataConfig, LossConfig, from_json, read_config, to_json
from afl_jax.errors import InputError

OTHER = Config(
    data=DataConfig(
        name="folder", source="x", spacing=(1.0, 1.0, 3.0), label_map=((0, 0), (2, 1)), num_val=4
    ),
    loss=LossConfig(name="focal", options=(("gamma", 3.0), ("alpha", 0.25))),
    num_epochs=7,
    num_devices=2,
)


@pytest.mark.parametrize("config", [Config(), OTHER], ids=["default", "other"])
def test_a_config_survives_json(config: Config):
    assert from_json(to_json(config)) == config


def test_a_config_is_hashable_and_compared_by_value():
    assert hash(Config()) == hash(Config())
    assert dataclasses.replace(OTHER, num_epochs=8) != OTHER


def test_fields_left_out_have_their_defaults():
    assert from_json('{"num_epochs": 3}') == Config(num_epochs=3)


def test_whole_numbers_serve_as_floats():
    config = from_json('{"optimizer": {"learning_rate": 1}, "data": {"spacing": [1, 1, 3]}}')
    assert config.optimizer.learning_rate == 1.0
    assert config.data.spacing == (1.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "my.json is not valid JSON"),
        ("[]", "my.json must be an object"),
        ('{"epochs": 3}', "my.json has no field 'epochs': choose from data, model"),
        ('{"data": {"nam": "x"}}', "my.json.data has no field 'nam'"),
        ('{"num_epochs": "3"}', "my.json.num_epochs must be int, got '3'"),
        ('{"num_epochs": true}', "my.json.num_epochs must be int, got True"),
        ('{"num_epochs": null}', "my.json.num_epochs must be int, got None"),
        ('{"data": {"shape": [8, 8]}}', "my.json.data.shape must be tuple"),
        ('{"data": {"shape": [8, 8, 8.5]}}', "my.json.data.shape[2] must be int, got 8.5"),
        ('{"optimizer": {"name": "sdg"}}', "my.json.optimizer.name must be Literal"),
        ('{"data": {"spacing": "1 1 3"}}', "my.json.data.spacing must be tuple"),
    ],
)
def test_a_mistake_is_named_where_it_stands(text: str, message: str):
    with pytest.raises(InputError) as error:
        from_json(text, name="my.json")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_every_field_says_what_it_is():
    def fields(kind: type, prefix: str = ""):
        for field in dataclasses.fields(kind):
            yield f"{prefix}{field.name}"
            if dataclasses.is_dataclass(field.type):
                yield from fields(field.type, f"{prefix}{field.name}.")

    written = json.loads(to_json(Config()))
    for name in fields(Config):
        value = written
        for part in name.split("."):
            value = value[part]


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json cannot be read as a config"):
        read_config(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.json cannot be read as a config"):
        read_config(tmp_path / "binary.json")
