"""`CheckpointConfig`: MindSpore's options, checked as MindSpore checks them, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from parckpt.core import checks, policyoptions
from parckpt.core.policy import SavePolicy
from parckpt.core.retention import RetentionPolicy
from parckpt.core.triggers import Trigger
from parckpt.errors import ConfigError

__all__ = ["CheckpointConfig"]

_T = TypeVar("_T")

_NUMBERS = (
    "save_checkpoint_steps",
    "save_checkpoint_seconds",
    "keep_checkpoint_max",
    "keep_checkpoint_per_n_minutes",
)


class _Option(Generic[_T]):
    """A read-only option; its value is in the instance's ``_options``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _Option[_T]: ...
    @overload
    def __get__(self, instance: CheckpointConfig, owner: type) -> _T: ...
    def __get__(self, instance: CheckpointConfig | None, owner: type) -> _Option[_T] | _T:
        if instance is None:
            return self
        value: _T = instance._options[self.name]
        return value

    def __set__(self, instance: CheckpointConfig, value: _T) -> None:
        raise AttributeError(f"{self.name} cannot be changed: make another CheckpointConfig")


class _Flag(_Option[bool]):
    """A bool that can be assigned, because MindSpore's can."""

    def __set__(self, instance: CheckpointConfig, value: bool) -> None:
        instance._options[self.name] = checks.boolean(self.name, value)


class _Free(_Option[Any]):
    """An option that can be assigned anything, because MindSpore's can, and that nothing here reads."""

    def __set__(self, instance: CheckpointConfig, value: Any) -> None:
        instance._options[self.name] = value


class CheckpointConfig:
    """What to save, when, how, and how much of it to keep.

    The first 14 parameters are those of MindSpore's class of this name: order, defaults, checks and properties. What
    differs on purpose is listed in ``docs/compatibility.md``. Not collective; nothing is printed or warned about here
    (see `warnings`).

    Parameters
    ----------
    save_checkpoint_steps : int or None
        Save when so many steps passed since the last save.
    save_checkpoint_seconds : int or None
        Save when more than so many seconds passed. Void if `save_checkpoint_steps` is not 0 or None.
    keep_checkpoint_max : int or None
        Keep the newest so many.
    keep_checkpoint_per_n_minutes : int or None
        Keep one per so many minutes. Void if `keep_checkpoint_max` is not 0 or None; if both are 0 or None, one
        checkpoint is kept.
    integrated_save : bool
        One file with every full tensor, written by root; False: a file per rank. Void with `remove_redundancy`.
    async_save : bool, "thread" or "process"
        Go on while writing. True is "thread".
    saved_network : mapping, callable or object with ``state_dict()``, optional
        Saved where no state is handed to `step_end`, and in place of a training loop's network; read anew at each save.
    append_info : list, optional
        ``"epoch_num"``, ``"step_num"`` and at most one dict of values to store beside the state.
    enc_key : bytes, optional
        16, 24 or 32 bytes (SM4: 16). Never shown or stored anywhere.
    enc_mode : {"AES-GCM", "AES-CBC", "SM4-CBC"}
    exception_save : bool
        Save when an exception or a signal ends the run.
    crc_check : bool
        Add MindSpore's own checksum to the files. (The manifest has checksums of all chunks in any case.)
    remove_redundancy : bool
        Write what several ranks hold alike once. A file per rank.
    format : {"ckpt", "safetensors", "hdf5"}
    triggers : sequence of EverySteps, EverySeconds, EveryEpochs, AtSteps
        Any of these makes a save due, beside `save_checkpoint_steps` or `save_checkpoint_seconds`.
    ephemeral_steps : int, optional
        Save also so many steps after the last save, but keep that one only until the next publish. It does not count
        for `keep_checkpoint_max`, and does not delay the other saves.
    keep_every_n_steps : int, optional
        Keep for good, beside what the numbers above keep, the first at or after each multiple of so many steps.
    keep_best : int
        Keep also so many with the best `best_metric`; of equal ones the newer. 0: none.
    best_metric : str, optional
        Name of one of the ``metrics`` given to `step_end`; root's value counts. What has none, or NaN, is never best.
    best_mode : {"min", "max"}
        Which is better.
    time_to_live_s : float, optional
        Delete after a publish what is older than so many seconds, though the numbers above would keep it. Not what
        `keep_every_n_steps` and `keep_best` keep, and not the newest that a restore would take.
    replica_check : {"first", "always", "never"}
        When to compare what ranks hold as replicas; "first": at the first save, and after each change of the plan.
    split_replicas : bool, optional
        Cut big replicas so that their holders share the writing. Default: with `remove_redundancy`, unless
        `ownership` is "mindspore".
    on_save_error : {"raise", "warn"}
        "warn": go on training, but raise after `max_failed_saves` failures in a row.
    max_failed_saves : int
        So many failures in a row are an error also where one is only a warning.
    keep_breakpoints : int
        Keep the newest so many of those that exceptions and signals caused.
    file_mode, dir_mode : int
        Permission bits.
    lock_stale_s : float
        Seconds without a sign of life after which another job's lock may be replaced.
    agree_timeout_s, io_timeout_s : float
        Seconds after which waiting for other ranks, or for one's own worker, is an error.
    ownership : {"parckpt", "mindspore"}
        Who writes a replica with `remove_redundancy`: balanced by bytes, or by MindSpore's rule.
    incremental, enable_redundance
        MindSpore's two other keywords; shown as `map_param_inc` and `enable_redundance`, without effect.

    Attributes
    ----------
    append_dict : dict or None
        Made of `append_info`.
    warnings : tuple of str
        What was asked for and has no effect. Whoever uses the config says it, once, on root.

    Raises
    ------
    ConfigError, ConfigTypeError
        For the first wrong argument, in MindSpore's order. Both are ValueErrors, the second a TypeError too; their
        ``parameter`` is the argument's name.
    """

    save_checkpoint_steps = _Option[int | None]()
    save_checkpoint_seconds = _Option[int | None]()
    keep_checkpoint_max = _Option[int | None]()
    keep_checkpoint_per_n_minutes = _Option[int | None]()
    integrated_save = _Option[bool]()
    async_save = _Option[bool | str]()
    saved_network = _Option[Any]()
    append_dict = _Option[dict[str, Any] | None]()
    enc_key = _Option[bytes | None]()
    enc_mode = _Option[str]()
    exception_save = _Flag()
    crc_check = _Option[bool]()
    remove_redundancy = _Flag()
    format = _Option[str]()
    triggers = _Option[tuple[Trigger, ...]]()
    ephemeral_steps = _Option[int | None]()
    keep_every_n_steps = _Option[int | None]()
    keep_best = _Option[int]()
    best_metric = _Option[str | None]()
    best_mode = _Option[str]()
    time_to_live_s = _Option[float | None]()
    replica_check = _Option[str]()
    on_save_error = _Option[str]()
    max_failed_saves = _Option[int]()
    keep_breakpoints = _Option[int]()
    file_mode = _Option[int]()
    dir_mode = _Option[int]()
    lock_stale_s = _Option[float]()
    agree_timeout_s = _Option[float]()
    io_timeout_s = _Option[float]()
    ownership = _Option[str]()
    map_param_inc = _Option[Any]()
    enable_redundance = _Free()
    warnings: tuple[str, ...]

    def __init__(
        self,
        save_checkpoint_steps: int | None = 1,
        save_checkpoint_seconds: int | None = 0,
        keep_checkpoint_max: int | None = 5,
        keep_checkpoint_per_n_minutes: int | None = 0,
        integrated_save: bool = True,
        async_save: bool | str = False,
        saved_network: Any = None,
        append_info: list[Any] | None = None,
        enc_key: bytes | None = None,
        enc_mode: str = "AES-GCM",
        exception_save: bool = False,
        crc_check: bool = False,
        remove_redundancy: bool = False,
        format: str = "ckpt",
        *,
        triggers: Sequence[Trigger] = (),
        ephemeral_steps: int | None = None,
        keep_every_n_steps: int | None = None,
        keep_best: int = 0,
        best_metric: str | None = None,
        best_mode: str = "min",
        time_to_live_s: float | None = None,
        replica_check: str = "first",
        split_replicas: bool | None = None,
        on_save_error: str = "raise",
        max_failed_saves: int = 3,
        keep_breakpoints: int = 2,
        file_mode: int = 0o600,
        dir_mode: int = 0o700,
        lock_stale_s: float = 600.0,
        agree_timeout_s: float = 1800.0,
        io_timeout_s: float = 600.0,
        ownership: str = "parckpt",
        incremental: Any = False,
        enable_redundance: Any = False,
        **unknown: Any,
    ) -> None:
        given = dict(locals())
        del given["self"], given["unknown"]
        checks.unknown("CheckpointConfig", unknown, given)
        options = {**_check_mindspore(given), **_check_extras(given)}
        self.warnings = _void(options)
        _apply_precedence(options)
        self._options: dict[str, Any] = options

    @property
    def split_replicas(self) -> bool:
        """Whether replicas are cut among their holders."""
        given: bool | None = self._options["split_replicas"]
        return self.remove_redundancy and (self.ownership != "mindspore" if given is None else given)

    @property
    def is_integrated(self) -> bool:
        """Whether there is one file with full tensors: `integrated_save`, unless `remove_redundancy` voids it."""
        return self.integrated_save and not self.remove_redundancy

    @property
    def save_policy(self) -> SavePolicy:
        """When to save."""
        return SavePolicy(self.save_checkpoint_steps, self.save_checkpoint_seconds, self.triggers, self.ephemeral_steps)

    @property
    def retention_policy(self) -> RetentionPolicy:
        """What to keep."""
        return RetentionPolicy(
            self.keep_checkpoint_max,
            self.keep_checkpoint_per_n_minutes,
            self.keep_breakpoints,
            every_steps=self.keep_every_n_steps,
            best=self.keep_best,
            best_metric=self.best_metric,
            best_mode=self.best_mode,
            time_to_live_s=self.time_to_live_s,
        )

    def get_checkpoint_policy(self) -> dict[str, Any]:
        """The four numbers and the network, as a new dict."""
        return {name: self._options[name] for name in (*_NUMBERS, "saved_network")}

    def snapshot(self) -> CheckpointConfig:
        """A copy that does not follow when attributes of this one are assigned. It shares what the options refer to."""
        # By hand: the copy module goes through __reduce_ex__, which refuses keys.
        new = CheckpointConfig.__new__(type(self))
        new.__dict__.update(self.__dict__, _options=dict(self._options))
        return new

    def describe(self) -> dict[str, Any]:
        """All options as plain values that ranks can compare and logs can show.

        Objects appear by type; of the key only whether there is one.
        """
        shown = dict(self._options, split_replicas=self.split_replicas)
        shown["triggers"] = [repr(trigger) for trigger in self.triggers]
        shown["enc_key"] = None if self.enc_key is None else "<set>"
        shown["saved_network"] = None if self.saved_network is None else f"<{type(self.saved_network).__name__}>"
        if self.append_dict is not None:
            shown["append_dict"] = {key: _show(value) for key, value in self.append_dict.items()}
        for name in ("map_param_inc", "enable_redundance"):
            shown[name] = _show(shown[name])
        return shown

    def __repr__(self) -> str:
        return f"CheckpointConfig({', '.join(f'{name}={value!r}' for name, value in self.describe().items())})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickle is how objects reach other ranks and disks, and a key must reach neither.
        if self.enc_key is not None:
            raise ConfigError(
                "a CheckpointConfig with a key cannot be pickled or copied: construct it where it is used"
            )
        return super().__reduce_ex__(protocol)


def _show(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"<{type(value).__name__}>"


def _check_mindspore(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the 14 parameters in MindSpore's order, the first failure wins; then what goes together."""
    options = {name: checks.count(name, given[name], none=True) for name in _NUMBERS}
    network = checks.network(given["saved_network"])
    if not any(options.values()):
        raise ConfigError(f"{', '.join(_NUMBERS)} cannot all be None or 0", parameter=_NUMBERS[0])
    exception_save = checks.boolean("exception_save", given["exception_save"])
    options["integrated_save"] = checks.boolean("integrated_save", given["integrated_save"])
    options["async_save"] = checks.asynchronous(given["async_save"])
    options["saved_network"] = network
    options["append_dict"] = checks.append_dict(given["append_info"])
    options["enc_key"], options["enc_mode"] = checks.encryption(given["enc_key"], given["enc_mode"])
    options["exception_save"] = exception_save
    options["crc_check"] = checks.boolean("crc_check", given["crc_check"])
    file_format = checks.choice("format", given["format"], ("ckpt", "safetensors", "hdf5"))
    options["remove_redundancy"] = checks.boolean("remove_redundancy", given["remove_redundancy"])
    options["format"] = file_format
    options["map_param_inc"], options["enable_redundance"] = given["incremental"], given["enable_redundance"]
    _check_together(options)
    return options


def _check_together(options: Mapping[str, Any]) -> None:
    encrypts = options["enc_key"] is not None
    if encrypts and options["crc_check"]:
        raise ConfigError(
            "crc_check cannot be used with enc_key: the trailer would make the encrypted file unreadable to MindSpore; "
            "stored bytes are checked by the manifest anyway",
            parameter="crc_check",
        )
    if options["format"] != "ckpt":
        if encrypts or options["enc_mode"] != "AES-GCM":
            name = "enc_key" if encrypts else "enc_mode"
            raise ConfigError(f"{name} needs format 'ckpt': {options['format']} has no encrypted form", parameter=name)
        if options["map_param_inc"]:
            raise ConfigError("incremental needs format 'ckpt'", parameter="incremental")


def _check_extras(given: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {
        **policyoptions.check(given),
        "replica_check": checks.choice("replica_check", given["replica_check"], ("first", "always", "never")),
        "split_replicas": given["split_replicas"],
        "on_save_error": checks.choice("on_save_error", given["on_save_error"], ("raise", "warn")),
        "max_failed_saves": checks.count("max_failed_saves", given["max_failed_saves"], least=1),
        "keep_breakpoints": checks.count("keep_breakpoints", given["keep_breakpoints"]),
        "file_mode": checks.mode("file_mode", given["file_mode"], 0o600),
        "dir_mode": checks.mode("dir_mode", given["dir_mode"], 0o700),
    }
    for name in ("lock_stale_s", "agree_timeout_s", "io_timeout_s"):
        options[name] = checks.seconds(name, given[name])
    options["ownership"] = checks.choice("ownership", given["ownership"], ("parckpt", "mindspore"))
    if given["split_replicas"] is not None:
        checks.boolean("split_replicas", given["split_replicas"])
    if given["split_replicas"] and options["ownership"] == "mindspore":
        raise ConfigError(
            'split_replicas=True contradicts ownership="mindspore": MindSpore never cuts a replica',
            parameter="split_replicas",
        )
    return options


def _void(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Say of each argument that another one voids, as far as it can be told from a default."""
    steps, seconds = options["save_checkpoint_steps"], options["save_checkpoint_seconds"]
    most, minutes = options["keep_checkpoint_max"], options["keep_checkpoint_per_n_minutes"]
    spared = options["remove_redundancy"]
    said = {
        f"save_checkpoint_seconds={seconds} has no effect: save_checkpoint_steps={steps} decides; "
        "set save_checkpoint_steps=0": bool(steps and seconds),
        "save_checkpoint_steps and save_checkpoint_seconds are both 0 or None: nothing is saved unless asked for": (
            not steps and not seconds and not options["triggers"] and not options["ephemeral_steps"]
        ),
        f"keep_checkpoint_per_n_minutes={minutes} has no effect: keep_checkpoint_max={most} decides; "
        "set keep_checkpoint_max=0": bool(most and minutes),
        "keep_checkpoint_max and keep_checkpoint_per_n_minutes are both 0 or None: one checkpoint is kept": (
            not most and not minutes
        ),
        f"enc_mode={options['enc_mode']!r} has no effect without enc_key: nothing is encrypted": (
            options["enc_key"] is None and options["enc_mode"] != "AES-GCM"
        ),
        "split_replicas=True has no effect without remove_redundancy": bool(options["split_replicas"] and not spared),
        'ownership="mindspore" has no effect without remove_redundancy': (
            options["ownership"] == "mindspore" and not spared
        ),
        f'max_failed_saves={options["max_failed_saves"]} has no effect: on_save_error="raise" decides': (
            options["on_save_error"] == "raise" and options["max_failed_saves"] != 3
        ),
        "incremental has no effect: there are no MapParameters to save in parts": bool(options["map_param_inc"]),
        "enable_redundance has no effect: parckpt finds replicas by itself": bool(options["enable_redundance"]),
    }
    said |= policyoptions.void(options)
    return tuple(message for message, applies in said.items() if applies)


def _apply_precedence(options: dict[str, Any]) -> None:
    """Void the weaker numbers, as MindSpore does."""
    if options["save_checkpoint_steps"]:
        options["save_checkpoint_seconds"] = None
    if options["keep_checkpoint_max"]:
        options["keep_checkpoint_per_n_minutes"] = None
    elif not options["keep_checkpoint_per_n_minutes"]:
        options["keep_checkpoint_max"] = 1
