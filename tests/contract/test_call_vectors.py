"""MindSpore's recorded verdicts on 71 calls, one table per function, each equal here or listed as a difference.

A recording says in words what was called; the tables below say it in code. The class that MindSpore raised must be
among the bases of ours.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors" / "call_vectors.json").read_text())
KEY = b"0" * 16
PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "w.bias": np.ones(3, np.float32)}

Call = Callable[[], Any]


def load(name: Any = "p.ckpt", **options: Any) -> dict[str, Any]:
    found = parckpt.load_checkpoint(name, allow_unverified=True, **options)
    assert set(found) <= set(PARAMS)
    return found


def save(save_obj: Any = PARAMS, name: Any = "o.ckpt", **options: Any) -> None:
    parckpt.save_checkpoint(save_obj, name, **options)
    written = name if Path(name).suffix else f"{name}.{options.get('format', 'ckpt')}"
    assert parckpt.load_checkpoint(written)


def divide_by_zero(name: str) -> bool:
    return bool(1 / 0)


class Tensor:
    """Something that is no array, no Leaf and no plain value."""


LOAD: dict[str, Call] = {
    "'missing.ckpt'": lambda: load("missing.ckpt"),
    "'p.bin'": lambda: load("p.bin"),
    "'.'": lambda: load("."),
    "'dir.ckpt' (a directory)": lambda: load("dir.ckpt"),
    "5": lambda: load(5),
    "None": lambda: load(None),
    "'p.ckpt', format='xx'": lambda: load(format="xx"),
    "'p.ckpt', format='safetensors'": lambda: load(format="safetensors"),
    "'s.safetensors'": lambda: load("s.safetensors"),
    "'p.ckpt', dec_key='str'": lambda: load(dec_key="0" * 16),
    "'p.ckpt', dec_mode=None": lambda: load(dec_mode=None),
    "'p.ckpt', crc_check=1": lambda: load(crc_check=1),
    "'p.ckpt', remove_redundancy=1": lambda: load(remove_redundancy=1),
    "'p.ckpt', dec_key=16 bytes (file is plain)": lambda: load(dec_key=KEY),
    "'s.safetensors', format, dec_key": lambda: load("s.safetensors", format="safetensors", dec_key=KEY),
    "'s.safetensors', format, dec_mode='AES-CBC'": lambda: load(
        "s.safetensors", format="safetensors", dec_mode="AES-CBC"
    ),
    "'p.ckpt', filter_prefix='w'": lambda: load(filter_prefix="w"),
    "'p.ckpt', specify_prefix='zz'": lambda: load(specify_prefix="zz"),
    "'p.ckpt', specify_prefix=()": lambda: load(specify_prefix=()),
    "'p.ckpt', specify_prefix=''": lambda: load(specify_prefix=""),
    "'p.ckpt', specify_prefix=1": lambda: load(specify_prefix=1),
    "'p.ckpt', specify_prefix=[1]": lambda: load(specify_prefix=[1]),
    "'p.ckpt', choice_func=always False": lambda: load(choice_func=lambda name: False),
    "'p.ckpt', choice_func raises ZeroDivisionError": lambda: load(choice_func=divide_by_zero),
}

SAVE: dict[str, Call] = {
    "params, 'o', format='xx'": lambda: save(name="o", format="xx"),
    "params, 5": lambda: save(name=5),
    "5, 'o.ckpt'": lambda: save(5),
    "params, '.'": lambda: save(name="."),
    "params, 'nodir/o.ckpt'": lambda: save(name="nodir/o.ckpt"),
    "integrated_save=1": lambda: save(integrated_save=1),
    "async_save=1": lambda: save(async_save=1),
    "async_save='x'": lambda: save(async_save="x"),
    "crc_check=1": lambda: save(crc_check=1),
    "append_dict=[1]": lambda: save(append_dict=[1]),
    "append_dict={'a': None}": lambda: save(append_dict={"a": None}),
    "append_dict={1: 1}": lambda: save(append_dict={1: 1}),
    "enc_key='str'": lambda: save(enc_key="0" * 16),
    "enc_key=bytearray": lambda: save(enc_key=bytearray(16)),
    "enc_key=b''": lambda: save(enc_key=b""),
    "enc_key 15 bytes": lambda: save(enc_key=KEY[:15]),
    "enc_key 17 bytes": lambda: save(enc_key=KEY + b"0"),
    "enc_key 24 bytes SM4-CBC": lambda: save(enc_key=b"0" * 24, enc_mode="SM4-CBC"),
    "enc_key 32 bytes SM4-CBC": lambda: save(enc_key=b"0" * 32, enc_mode="SM4-CBC"),
    "enc_mode='aes-gcm' with key": lambda: save(enc_key=KEY, enc_mode="aes-gcm"),
    "enc_mode='AES-CTR' with key": lambda: save(enc_key=KEY, enc_mode="AES-CTR"),
    "enc_mode='XXX' without key": lambda: warned(lambda: save(enc_mode="XXX"), "without enc_key"),
    "enc_mode=None": lambda: save(enc_mode=None),
    "remove_redundancy=1": lambda: save(remove_redundancy=1),
    "unknown keyword foo=1": lambda: save(foo=1),
    "safetensors enc_key": lambda: save(name="o", format="safetensors", enc_key=KEY),
    "safetensors enc_mode": lambda: save(name="o", format="safetensors", enc_mode="AES-CBC"),
    "safetensors incremental=True": lambda: save(name="o", format="safetensors", incremental=True),
    "safetensors global_step_num=1": lambda: save(name="o", format="safetensors", global_step_num=1),
    "safetensors crc_check=True": lambda: save(name="o", format="safetensors", crc_check=True),
    "safetensors append_dict with str": lambda: save(name="o", format="safetensors", append_dict={"note": "text"}),
    "list of Tensor": lambda: save([Tensor()]),
    "list of dict without data": lambda: save([{"name": "a"}]),
    "list of dict, numpy data": lambda: save([{"name": "a", "data": np.ones(2)}]),
    "list of dict, int name": lambda: save([{"name": 1, "data": np.ones(2)}]),
    "dict of numpy": lambda: save({"a": np.ones(2)}),
    "dict of Tensor": lambda: save({"a": Tensor()}),
    "dict with int key": lambda: save({1: np.ones(2)}),
}

CHECKPOINT: dict[str, Call] = {
    "'a/b'": lambda: make("a/b"),
    "5": lambda: make(5),
    "None": lambda: make(None),
    "''": lambda: make(""),
    "'a', directory=5": lambda: make("a", 5),
    "'a', directory=' '": lambda: make("a", " "),
    "'a', directory is a file": lambda: make("a", "p.ckpt"),
    "'a', directory of 1100 chars": lambda: make("a", "d" * 1100),
    "'a', None, config=5": lambda: make("a", None, 5),
}


def make(*args: Any) -> None:
    parckpt.ModelCheckpoint(*args, comm=parckpt.SELF).close()


def warned(call: Call, words: str) -> None:
    with pytest.warns(parckpt.ConfigWarning, match=words):
        call()


TABLES = {"load_checkpoint": LOAD, "save_checkpoint": SAVE, "ModelCheckpoint": CHECKPOINT}

# Where the verdict differs on purpose: what happens here (None: it works), and why. Each is in docs/compatibility.md.
MORE = "more is accepted here"
DIFFERENCES: dict[tuple[str, str], tuple[type[Exception] | None, str]] = {
    ("load_checkpoint", "'s.safetensors'"): (None, "the format is told by the extension"),
    ("save_checkpoint", "unknown keyword foo=1"): (parckpt.ConfigError, "a misspelt option would go unnoticed"),
    ("save_checkpoint", "list of dict, numpy data"): (None, MORE),
    ("save_checkpoint", "dict with int key"): (None, MORE),
    ("save_checkpoint", "dict of Tensor"): (parckpt.ConfigError, "an error that says so, not an UnboundLocalError"),
}


@pytest.fixture(params=["with manifest", "without"])
def _files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parckpt.save_checkpoint(PARAMS, "p")
    parckpt.save_checkpoint(PARAMS, "s", format="safetensors")
    Path("p.bin").write_bytes(Path("p.ckpt").read_bytes())
    Path("dir.ckpt").mkdir()
    if request.param == "without":
        for manifest in tmp_path.glob("*.manifest"):
            manifest.unlink()


def test_every_recorded_call_has_its_line() -> None:
    recorded = [(vector["call"], vector["args"]) for vector in VECTORS]
    assert len(recorded) == len(set(recorded)) == 71
    assert sorted(recorded) == sorted((name, args) for name, table in TABLES.items() for args in table)
    assert set(DIFFERENCES) <= set(recorded)


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['call']}({vector['args']})")
def test_as_recorded_from_mindspore(vector: dict[str, Any]) -> None:
    name = vector["call"], vector["args"]
    call = TABLES[name[0]][name[1]]
    wanted: type[BaseException] | None = None
    if name in DIFFERENCES:
        wanted = DIFFERENCES[name][0]
    elif vector["result"] == "error":
        wanted = getattr(builtins, vector["error_type"], parckpt.ConfigError)  # one is the safetensors library's own
    if wanted is None:
        call()
        return
    before = {path: path.stat().st_size for path in Path().iterdir()}
    with pytest.raises(wanted) as caught:
        call()
    assert isinstance(caught.value, parckpt.ParckptError)
    assert {path: path.stat().st_size for path in Path().iterdir()} == before
