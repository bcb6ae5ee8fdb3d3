"""What cannot be read, cannot be a checkpoint's name, is encrypted, or is no path at all: said so, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.storage.filesystem import FileStat, PosixFileSystem, storage_error

COMMANDS = ("ls", "status", "explain", "verify")


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the file system of the looking commands refuse some paths: the tests may run as root."""

    def start(*suffixes: str, code: int = errno.EACCES, stat: bool = False) -> None:
        class Refusing(PosixFileSystem):
            def open(self, path: str, flags: int, mode: int = 0o600) -> int:
                if path.endswith(suffixes):
                    raise storage_error("open", path, code)
                return super().open(path, flags, mode)

            def stat(self, path: str) -> FileStat:
                if stat and path.endswith(suffixes):
                    raise storage_error("stat", path, code)
                return super().stat(path)

        for command in COMMANDS:
            monkeypatch.setattr(f"parckpt.cli.{command}.PosixFileSystem", Refusing)

    return start


def _manifest_of(directory: Path, stem: str) -> str:
    return next(name for name in os.listdir(directory) if name.startswith(f"{stem}.") and name.endswith(".manifest"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["ranks-2_2", "one-2_2.ckpt", "single.ckpt"])
def test_one_unreadable_manifest_hides_no_other(call: Any, published: Path, refuse: Any, name: str, code: int) -> None:
    stem = name.removesuffix(".ckpt")
    refuse(f"{name}/manifest" if stem == name else _manifest_of(published, stem), code=code)
    listed = call("ls", published, "--json")
    rows = {row["name"]: row for row in listed.json["checkpoints"]}
    assert (listed.status, len(rows)) == (6, 7)
    assert {row["state"] for row in rows.values() if row["name"] != name} == {"ok"}
    assert (rows[name]["state"], rows[name]["code"], rows[name]["step"]) == ("unreadable", "storage", None)
    assert os.strerror(code) in rows[name]["problem"]
    shown = call("ls", published)
    assert (shown.status, "unreadable: " in shown.out, "no manifest" in shown.out) == (6, True, False)
    status = call("status", published)
    assert (status.status, f"{name}: unreadable: " in status.out, "owners" in status.out) == (6, True, True)
    explained = call("explain", published, "--json")
    assert explained.status == 6
    by_family = {row["prefix"]: row for row in explained.json["prefixes"]}
    # A restore of any prefix reads all manifests, and fails.
    assert by_family["owners"]["restore"] == f"fails: {name} cannot be read, and may be the newest"
    assert [one["step"] for one in by_family["owners"]["checkpoints"]] == [5, 4]
    (stays,) = [c["stays"] for row in explained.json["prefixes"] for c in row["checkpoints"] if c["name"] == name]
    assert stays == "unreadable: neither counted nor deleted"
    verified = call("verify", published, "--json")
    assert (verified.status, verified.json["counts"]) == (
        6,
        {"sound": 6, "damaged": 0, "unreadable": 1, "unverified": 0},
    )
    assert call("ls", published, "--prefix", "owners").status == 0


def test_a_restore_is_not_tolerant(published: Path, refuse: Any) -> None:
    refuse("ranks-2_1/manifest")
    from parckpt.cli import ls

    fs = ls.PosixFileSystem()
    with (
        parckpt.ModelCheckpoint("one", published, comm=parckpt.SELF, filesystem=fs) as run,
        pytest.raises(parckpt.StorageError, match="ranks-2_1"),
    ):
        run.restore(strict=False)


def test_what_stat_refuses_is_no_damage(call: Any, published: Path, refuse: Any) -> None:
    refuse("rank_1/ranks-2_2.ckpt", stat=True)
    listed = call("ls", published, "--json")
    (row,) = [row for row in listed.json["checkpoints"] if row["state"] != "ok"]
    assert (row["name"], row["state"], listed.status) == ("ranks-2_2", "unreadable", 6)
    assert call("verify", published / "ranks-2_2").status == 6


def test_a_mark_of_what_is_unreadable(call: Any, published: Path, refuse: Any) -> None:
    manifest = _manifest_of(published, "one-2_2")
    (published / f".one-2_2.bad-{manifest.split('.')[1]}").write_text("x")
    refuse(manifest)
    found = call("status", published, "--json")
    assert (found.status, found.json["debris"]) == (6, [])


def _encrypted(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xd8\x5e\x3a\x7f" + bytes(200))
    return path


@pytest.mark.parametrize("command", ["convert", "merge", "copy", "show", "verify", "diff", "split"])
def test_what_mindspore_encrypted(call: Any, tmp_path: Path, command: str) -> None:
    alone, within = _encrypted(tmp_path / "x.ckpt"), _encrypted(tmp_path / "ranks" / "rank_0" / "x.ckpt")
    more = {"show": (), "verify": (), "diff": (alone,), "split": (tmp_path / "new", "--ranks", 2)}
    for src, file in ((alone, alone), (within.parent.parent, within)):
        done = call(command, src, *more.get(command, (tmp_path / "new",)))
        said = f"{file} is encrypted with AES-GCM: parckpt cannot read encrypted files yet"
        assert (done.status, said in done.err + done.out) == (3, True), done
        assert "damage" not in done.err + done.out
    assert not (tmp_path / "new").exists()


def test_damage_outweighs_what_is_encrypted(call: Any, golden: Path, tmp_path: Path) -> None:
    _encrypted(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(b"nothing")
    found = call("verify", tmp_path, "--json")
    assert (found.status, found.json["counts"]["unreadable"], found.json["counts"]["damaged"]) == (5, 1, 1)


def test_ranks_other_than_those_of_the_strategy(call: Any, golden: Path, tmp_path: Path) -> None:
    strategies = golden / "strategy"
    four, two = strategies / "strategy_4dev.ckpt", strategies / "strategy_2dev.ckpt"
    words = ("split", strategies / "src_ckpt", tmp_path / "new", "--source-strategy", four, "--strategy", two)
    for ranks in (1, 4):
        done = call(*words, "--ranks", ranks)
        assert (done.status, f"--ranks says {ranks}, but {two} is for 2 ranks" in done.err) == (3, True), done.err
    assert call(*words, "--ranks", 2).status == 0


def test_names_that_no_checkpoint_can_have(call: Any, published: Path) -> None:
    os.rename(published / "ranks-2_2", published / "a\x1b-1_1")
    shutil.copytree(published / "ranks-2_1", published / "mine")
    shutil.copytree(published / "ranks-2_1", published / "theirs")
    (published / "theirs" / "manifest").unlink()
    listed = call("ls", published, "--json")
    states = {row["name"]: (row["state"], row["problem"]) for row in listed.json["foreign"]}
    assert states == {
        "a\x1b-1_1": ("renamed", "no checkpoint can have this name; it was saved as 'ranks-2_2'"),
        "mine": ("renamed", "it was saved as 'ranks-2_1'"),
        "theirs": ("no manifest", None),
    }
    assert listed.status == 0
    text = call("ls", published).out
    assert r"a\x1b-1_1" in text
    assert "renamed: no checkpoint can have this name" in text
    verdicts = {row["path"]: row["verdict"] for row in call("verify", published, "--json").json["checkpoints"]}
    assert [verdicts[str(published / name)] for name in ("a\x1b-1_1", "mine", "theirs")] == [
        *("sound", "sound", "unverified")
    ]


@pytest.mark.parametrize("command", ["convert", "merge", "split"])
def test_one_file_of_several_is_not_the_checkpoint(call: Any, published: Path, tmp_path: Path, command: str) -> None:
    for name in ("ranks-2_2/rank_0/ranks-2_2.ckpt", "owners-2_2/rank_1/owners-2_2.safetensors"):
        root = published / name.split("/")[0]
        more = ("--ranks", 2) if command == "split" else ()
        done = call(command, published / name, tmp_path / "new", *more)
        assert (done.status, f"give the whole of it, {root}\n" in done.err) == (3, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpts"]


def test_the_only_file_of_a_step_directory_is_all_of_it(call: Any, tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, integrated_save=False)
    with parckpt.ModelCheckpoint("m", tmp_path / "run", config, comm=parckpt.SELF) as run:
        run.step_end({"w": np.ones(3)}, 1)
    done = call("convert", tmp_path / "run/m-1_1/rank_0/m-1_1.ckpt", tmp_path / "new.safetensors")
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    "words",
    [
        *((command, "") for command in ("ls", "status", "explain", "verify", "show", "pin", "unlock", "plan")),
        *(("prune", "", "--keep", 1), ("diff", "", "SRC"), ("diff", "SRC", "")),
        *(("convert", "", "x.ckpt"), ("merge", "", "x.ckpt"), ("split", "", "x", "--ranks", 2), ("copy", "", "x")),
        *(("convert", "SRC", ""), ("merge", "SRC", ""), ("split", "SRC", "", "--ranks", 2), ("copy", "SRC", "")),
        *(("merge", "SRC", "x.ckpt", "--strategy", ""), ("split", "SRC", "x", "--strategy", "")),
        *(("split", "SRC", "x", "--layout", ""), ("plan", "SRC", "--ranks", 2, "--measure", "")),
    ],
)
def test_an_empty_path(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    parckpt.save_checkpoint({"w": np.ones(4)}, tmp_path / "SRC")
    done = call(*("SRC.ckpt" if word == "SRC" else word for word in words), "--json")
    assert (done.status, done.json["error"]["message"]) == (3, "a path is empty; the current directory is .")
    assert not list(tmp_path.glob("x*"))
