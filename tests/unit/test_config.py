"""CheckpointConfig against 258 recorded calls of MindSpore's class, then our own options."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from parckpt.core.config import CheckpointConfig
from parckpt.core.leaves import Leaf
from parckpt.errors import ConfigError, ConfigTypeError, ParckptError

pytestmark = pytest.mark.fast

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors" / "config_vectors.json").read_text())
PROPERTIES = [name for name in VECTORS[0]["ok"] if name != "enable_redundance"]

# Where we differ on purpose: the call, what happens here, why.
REFUSED_AT_ONCE = "MindSpore accepts it and fails at the first save"
UNREADABLE = "MindSpore accepts it and writes files it cannot read"
POSSIBLE_HERE = "MindSpore refuses what we can do"
DIFFERENCES = [
    ({"enc_key": b"0" * 5}, ConfigError, REFUSED_AT_ONCE),
    ({"enc_key": b""}, ConfigError, REFUSED_AT_ONCE),
    ({"enc_mode": "aes-gcm"}, ConfigError, REFUSED_AT_ONCE),
    ({"enc_mode": "XXX"}, ConfigError, REFUSED_AT_ONCE),
    ({"enc_mode": ""}, ConfigError, REFUSED_AT_ONCE),
    ({"format": "xx"}, ConfigError, REFUSED_AT_ONCE),
    ({"format": ""}, ConfigError, REFUSED_AT_ONCE),
    ({"format": "CKPT"}, ConfigError, REFUSED_AT_ONCE),
    ({"format": ".ckpt"}, ConfigError, REFUSED_AT_ONCE),
    ({"append_info": ["step_num", {"step_num": "s"}]}, ConfigError, REFUSED_AT_ONCE),
    ({"enc_key": b"0" * 16, "crc_check": True}, ConfigError, UNREADABLE),
    ({"saved_network": {}}, None, "a mapping of arrays is our network"),
    ({"format": "safetensors", "crc_check": True}, None, POSSIBLE_HERE),
    ({"format": "safetensors", "exception_save": True}, None, POSSIBLE_HERE),
    ({"foo": 1}, ConfigTypeError, "MindSpore ignores it, so a misspelt option goes unnoticed"),
    ({"map_param_inc": True}, ConfigTypeError, "MindSpore ignores it: the keyword is called incremental"),
]


def revive(data):
    """Undo the recorder's spelling of what JSON cannot hold."""
    if isinstance(data, list):
        return [revive(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "$bytes" in data:
        return bytes.fromhex(data["$bytes"])
    if "$bytearray" in data:
        return bytearray.fromhex(data["$bytearray"])
    if "$numpy" in data:
        return np.dtype(data["$numpy"]).type(data["value"])
    if "$float" in data:
        return float(data["$float"])
    if "$complex" in data:
        return complex(*data["$complex"])
    if "$tuple" in data:
        return tuple(revive(data["$tuple"]))
    if "$dict" in data:
        return {key: revive(value) for key, value in data["$dict"]}
    return {key: revive(value) for key, value in data.items()}


def difference(kwargs):
    return next((entry for entry in DIFFERENCES if entry[0] == kwargs), None)


def test_every_listed_difference_was_recorded():
    recorded = [revive(vector["kwargs"]) for vector in VECTORS]
    assert len(recorded) == 258
    assert [entry for entry in DIFFERENCES if entry[0] not in recorded] == []


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["kwargs"])[:60])
def test_as_recorded_from_mindspore(vector):
    kwargs = revive(vector["kwargs"])
    listed = difference(kwargs)
    if listed is not None:
        if listed[1] is None:
            CheckpointConfig(**kwargs)
        else:
            with pytest.raises(listed[1]):
                CheckpointConfig(**kwargs)
    elif "error" in vector:
        with pytest.raises({"TypeError": TypeError, "ValueError": ValueError}[vector["error"]["type"]]) as caught:
            CheckpointConfig(**kwargs)
        assert isinstance(caught.value, ParckptError)
    else:
        config = CheckpointConfig(**kwargs)
        assert {name: getattr(config, name) for name in PROPERTIES} == {
            name: revive(vector["ok"][name]) for name in PROPERTIES
        }
        assert list(config.get_checkpoint_policy()) == vector["policy_keys"]


@pytest.mark.parametrize(
    ("kwargs", "first"),
    [
        ({"save_checkpoint_steps": -1, "keep_checkpoint_max": "x"}, "save_checkpoint_steps"),
        ({"keep_checkpoint_max": "x", "keep_checkpoint_per_n_minutes": "y"}, "keep_checkpoint_max"),
        ({"saved_network": 1, "async_save": 5}, "saved_network"),
        ({"saved_network": 1, "keep_checkpoint_per_n_minutes": -1}, "keep_checkpoint_per_n_minutes"),
        ({"exception_save": 2, "integrated_save": 3}, "exception_save"),
        ({"integrated_save": 3, "async_save": 4}, "integrated_save"),
        ({"async_save": 4, "append_info": 5}, "async_save"),
        ({"append_info": 5, "enc_key": 6}, "append_info"),
        ({"enc_key": 6, "enc_mode": 7}, "enc_key"),
        ({"enc_mode": 7, "crc_check": 8}, "enc_mode"),
        ({"crc_check": 8, "format": 9}, "crc_check"),
        ({"format": 9, "remove_redundancy": 10}, "format"),
        ({"remove_redundancy": 10, "replica_check": 11}, "remove_redundancy"),
    ],
)
def test_of_two_wrong_arguments_the_first_in_mindspores_order_is_named(kwargs, first):
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**kwargs)
    assert caught.value.parameter == first
    assert first in str(caught.value)


def test_fourteen_positional_arguments_in_mindspores_order():
    config = CheckpointConfig(
        2, 0, 3, 0, False, "thread", None, ["epoch_num"], b"k" * 24, "AES-CBC", True, False, True, "ckpt"
    )
    assert (config.save_checkpoint_steps, config.keep_checkpoint_max) == (2, 3)
    assert (config.integrated_save, config.async_save, config.append_dict) == (False, "thread", {"epoch_num": 0})
    assert (config.enc_key, config.enc_mode) == (b"k" * 24, "AES-CBC")
    assert (config.exception_save, config.crc_check, config.remove_redundancy) == (True, False, True)
    with pytest.raises(TypeError):
        CheckpointConfig(*[1, 0, 5, 0, True, False, None, None, None, "AES-GCM", False, False, False, "ckpt", "first"])


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("keep_checkpoints_max", "keep_checkpoint_max"),
        ("save_steps", "save_checkpoint_steps"),
        ("Remove_Redundancy", "remove_redundancy"),
        ("enc_keys", "enc_key"),
        ("replica_checks", "replica_check"),
    ],
)
def test_a_misspelt_keyword_is_a_type_error_that_names_the_nearest(misspelt, meant):
    with pytest.raises(TypeError, match=f"'{misspelt}'; did you mean '{meant}'"):
        CheckpointConfig(**{misspelt: 1})


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({}, []),
        ({"save_checkpoint_seconds": 1800}, ["save_checkpoint_seconds=1800 has no effect"]),
        ({"save_checkpoint_seconds": 1800, "save_checkpoint_steps": 0}, []),
        ({"keep_checkpoint_per_n_minutes": 9}, ["keep_checkpoint_per_n_minutes=9 has no effect"]),
        ({"keep_checkpoint_per_n_minutes": 9, "keep_checkpoint_max": None}, []),
        ({"keep_checkpoint_max": 0}, ["one checkpoint is kept"]),
        ({"save_checkpoint_steps": None}, ["nothing is saved unless asked for"]),
        ({"enc_mode": "AES-CBC"}, ["enc_mode='AES-CBC' has no effect without enc_key"]),
        ({"enc_mode": "AES-CBC", "enc_key": b"k" * 16}, []),
        ({"split_replicas": True}, ["split_replicas=True has no effect"]),
        ({"ownership": "mindspore"}, ['ownership="mindspore" has no effect']),
        ({"ownership": "mindspore", "remove_redundancy": True}, []),
        ({"max_failed_saves": 5}, ["max_failed_saves=5 has no effect"]),
        ({"max_failed_saves": 5, "on_save_error": "warn"}, []),
        ({"incremental": True}, ["incremental has no effect"]),
        ({"enable_redundance": True}, ["enable_redundance has no effect"]),
        (
            {"save_checkpoint_seconds": 5, "keep_checkpoint_per_n_minutes": 9},
            ["save_checkpoint_seconds=5 has no effect", "keep_checkpoint_per_n_minutes=9 has no effect"],
        ),
    ],
)
def test_voided_arguments_are_collected_not_warned_about(kwargs, told):
    # pytest makes warnings errors: that this constructs at all shows that none was issued.
    warnings = CheckpointConfig(**kwargs).warnings
    assert len(warnings) == len(told)
    assert all(expected in warning for expected, warning in zip(told, warnings, strict=True))


@pytest.mark.parametrize("name", ["save_checkpoint_steps", "enc_key", "format", "append_dict", "file_mode"])
def test_properties_are_read_only(name):
    config = CheckpointConfig()
    with pytest.raises(AttributeError, match=name):
        setattr(config, name, None)


def test_two_flags_can_be_assigned_as_in_mindspore_and_are_still_checked():
    config = CheckpointConfig()
    config.exception_save = config.remove_redundancy = True
    assert config.exception_save
    assert (config.is_integrated, config.split_replicas) == (False, True)
    with pytest.raises(TypeError):
        config.exception_save = 1


@pytest.mark.parametrize(
    ("kwargs", "splits"),
    [
        ({}, False),
        ({"remove_redundancy": True}, True),
        ({"remove_redundancy": True, "split_replicas": False}, False),
        ({"remove_redundancy": True, "ownership": "mindspore"}, False),
        ({"split_replicas": True}, False),
    ],
)
def test_replicas_are_cut_where_redundancy_is_removed_by_our_rule(kwargs, splits):
    assert CheckpointConfig(**kwargs).split_replicas is splits


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"replica_check": "sometimes"}, ConfigError),
        ({"replica_check": None}, ConfigTypeError),
        ({"split_replicas": 1}, ConfigTypeError),
        ({"split_replicas": True, "ownership": "mindspore", "remove_redundancy": True}, ConfigError),
        ({"on_save_error": "ignore"}, ConfigError),
        ({"max_failed_saves": 0}, ConfigError),
        ({"keep_breakpoints": -1}, ConfigError),
        ({"keep_breakpoints": None}, ConfigTypeError),
        ({"file_mode": 0o400}, ConfigError),
        ({"file_mode": 0o10600}, ConfigError),
        ({"dir_mode": 0o600}, ConfigError),
        ({"lock_stale_s": 0}, ConfigError),
        ({"agree_timeout_s": float("inf")}, ConfigError),
        ({"io_timeout_s": float("nan")}, ConfigError),
        ({"io_timeout_s": True}, ConfigTypeError),
        ({"ownership": "MindSpore"}, ConfigError),
        ({"enc_key": b"k" * 24, "enc_mode": "SM4-CBC"}, ConfigError),
        ({"format": "hdf5", "enc_key": b"k" * 16}, ConfigError),
        ({"append_info": [{"a": 2**64}]}, ConfigError),
        ({"append_info": [{"a": -(2**63) - 1}]}, ConfigError),
        ({"append_info": [{"a": np.array("text")}]}, ConfigTypeError),
        ({"append_info": [{"a": np.ma.masked_array([1])}]}, ConfigTypeError),
        ({"saved_network": dict}, ConfigTypeError),
        ({"saved_network": [1]}, ConfigTypeError),
    ],
)
def test_our_options_are_checked_too(kwargs, kind):
    with pytest.raises(kind) as caught:
        CheckpointConfig(**kwargs)
    assert type(caught.value) is kind


def test_networks_and_values_mindspore_does_not_know():
    class Net:
        def state_dict(self):
            return {}

    leaf = Leaf((2,), "bfloat16", read_into=lambda out: None)
    for network in (Net(), {"w": 1}, lambda: {}):
        assert CheckpointConfig(saved_network=network).saved_network is network
    array = np.arange(3)
    config = CheckpointConfig(append_info=["step_num", {"mean": array, "device": leaf, "lr": np.float64(0.1)}])
    assert list(config.append_dict) == ["step_num", "mean", "device", "lr"]
    assert config.append_dict["mean"] is array
    assert CheckpointConfig(format="hdf5", crc_check=True).format == "hdf5"


def test_counters_come_first_and_the_callers_dict_stays_its_own():
    mine = {"lr": 0.1, "epoch_num": 7}
    config = CheckpointConfig(append_info=[mine, "step_num", "epoch_num"])
    assert list(config.append_dict.items()) == [("epoch_num", 7), ("step_num", 0), ("lr", 0.1)]
    config.append_dict["step_num"] = 12
    assert "step_num" not in mine
    assert config.append_dict["step_num"] == 12


def test_the_key_is_shown_nowhere():
    key = b"correct horse ba"
    config = CheckpointConfig(enc_key=key, append_info=[{"a": np.zeros(2)}], saved_network={"w": np.zeros(1)})
    for text in (repr(config), str(config), json.dumps(config.describe())):
        assert "horse" not in text
        assert key.hex() not in text
    assert "enc_key='<set>'" in repr(config)
    assert "save_checkpoint_steps=1" in repr(config)
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match="key"):
            leave(config)
    for wrong in ({"enc_key": "correct horse"}, {"enc_key": b"correct horse"}):
        with pytest.raises(ConfigError) as caught:
            CheckpointConfig(**wrong)
        assert "horse" not in str(caught.value)


def test_a_config_without_a_key_can_be_copied():
    config = CheckpointConfig(save_checkpoint_steps=7)
    assert copy.deepcopy(config).describe() == config.describe()
    assert pickle.loads(pickle.dumps(config)).save_checkpoint_steps == 7


def test_policies_are_those_of_the_numbers_after_precedence():
    config = CheckpointConfig(save_checkpoint_seconds=9, keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=3)
    assert (config.save_policy.steps, config.save_policy.seconds) == (1, None)
    assert (config.retention_policy.count, config.retention_policy.minutes) == (0, 3)
