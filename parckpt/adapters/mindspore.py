"""MindSpore's Tensor, Parameter and Cell as leaves and states.

MindSpore is not imported here: an object of its classes can only exist where it is imported already.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parckpt.core import adapting, dtypes
from parckpt.core.dtypes import DType
from parckpt.core.leaves import Leaf
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["MindSpore", "make_callback"]

# Those that asnumpy() gives as they are. The others go as bytes: with numpy 2 MindSpore cannot make an array of
# bfloat16, and of its 8-bit floats it never could.
_NUMPY_KINDS = "biufc"


def _class(module: str, name: str) -> Any:
    """A class of a module that somebody else has imported, or None; also while it is still being imported."""
    return getattr(sys.modules.get(module), name, None)


class MindSpore:
    """The adapter (see `parckpt.core.adapting`)."""

    def as_leaf(self, value: Any) -> Leaf | None:
        """A leaf of a Tensor, Parameter, or random Generator's state; other ranks' slices are not known here."""
        kinds = tuple(filter(None, (_class("mindspore", name) for name in ("Tensor", "Parameter", "Generator"))))
        if not isinstance(value, kinds):
            return None
        if hasattr(value, "get_state"):
            return _generator(value)
        if hasattr(value, "key_dtype"):
            raise ConfigTypeError(f"{value.name!r} is a MapParameter: hash tables cannot be saved, only tensors")
        dtype = dtypes.by_ckpt(str(value.dtype))
        if dtype is None:
            raise ConfigTypeError(f"MindSpore tensors of type {value.dtype} cannot be saved")
        return Leaf(
            value.shape,
            dtype,
            lambda out: _read(value, dtype, out),
            lambda array: _write(value, dtype, array),
            origin=value,
        )

    def as_mapping(self, value: Any) -> Mapping[str, Any] | None:
        """A Cell's parameters under their own names, in its order; a tied one once.

        Raises
        ------
        ConfigError
            Two parameters have one name, or this process holds a slice of one that is cut over devices.
        """
        kind = _class("mindspore.nn", "Cell")
        if kind is None or not isinstance(value, kind):
            return None
        found: dict[str, Any] = {}
        for path, parameter in value.parameters_and_names():
            if parameter.param_info.is_pipeline_shared_param:
                continue  # another stage's: this one has a copy
            name = parameter.name
            if name in found:
                raise ConfigError(f"the network has two parameters called {name!r}, one of them at {path!r}")
            found[name] = parameter
        _refuse_slices(found, value.parameter_layout_dict)
        return found


def _generator(generator: Any) -> Leaf:
    make = _class("mindspore", "Tensor")
    shape = generator.get_state().shape
    return Leaf(
        shape,
        "uint8",
        lambda out: np.copyto(out, generator.get_state().asnumpy()),
        lambda array: generator.set_state(make(array)),
        origin=generator,
    )


def _read(tensor: Any, dtype: DType, out: np.ndarray[Any, Any]) -> None:
    if getattr(tensor, "has_init", False):
        tensor.init_data()  # not yet made: its values are those that training would begin with
    if dtype.numpy.kind in _NUMPY_KINDS:
        np.copyto(out, tensor.asnumpy(), casting="no")
    else:
        np.copyto(out, np.frombuffer(tensor.get_bytes(), out.dtype).reshape(out.shape))


def _write(tensor: Any, dtype: DType, array: np.ndarray[Any, Any]) -> None:
    make = _class("mindspore", "Tensor")
    if dtype.numpy.kind in _NUMPY_KINDS:
        # "=": a dtype that says "little-endian" in so many words is unknown to it where the numbers are complex.
        value = make(array.view(array.dtype.newbyteorder("=")), tensor.dtype)  # a copy
    else:
        value = make(make.convert_bytes_to_tensor(array.tobytes(), tuple(array.shape), tensor.dtype))
    assign = getattr(tensor, "set_data", None) or tensor.assign_value
    assign(value)


def _refuse_slices(parameters: Mapping[str, Any], layouts: Mapping[str, Any]) -> None:
    """Slices saved as if they were whole tensors would be taken for replicas of each other."""
    for name in parameters:
        layout = layouts.get(name)
        if layout and (any(axis != -1 for axis in layout[1]) or (len(layout) > 5 and layout[5])):
            whole = list(layout[6]) if len(layout) > 6 else "global_shape"
            raise ConfigError(
                f"the parameter {name!r} is cut over devices: hand in a mapping in which, in its place, stands "
                f"parckpt.Layout({list(layout[0])}, None, {list(layout[1])}).shard(parameter, {whole}, rank)"
            )


def make_callback(checkpoint: Any, metrics: Callable[[Any], Mapping[str, float]] | None = None) -> Any:
    """A ``mindspore.train.Callback`` that hands every event to an object of that shape. Imports MindSpore."""
    try:
        base: Any = importlib.import_module("mindspore.train").Callback
    except ImportError as error:
        raise ImportError(f"as_mindspore_callback() needs MindSpore: {error}") from error

    class CheckpointCallback(base):  # type: ignore[misc]  # the class is only known here
        """Saves through parckpt.

        Only these names: what is called begin, step_end and so on Model.fit refuses, and calls in evaluations, too.
        """

        def on_train_begin(self, run_context: Any) -> None:
            checkpoint.on_train_begin(run_context)

        def on_train_epoch_begin(self, run_context: Any) -> None:
            checkpoint.on_train_epoch_begin(run_context)

        def on_train_step_begin(self, run_context: Any) -> None:
            checkpoint.on_train_step_begin(run_context)

        def on_train_step_end(self, run_context: Any) -> None:
            measured = None if metrics is None else lambda: metrics(run_context.original_args())
            checkpoint.step_end(run_context, metrics=measured)
            if checkpoint.should_exit:
                run_context.request_stop()

        def on_train_epoch_end(self, run_context: Any) -> None:
            checkpoint.on_train_epoch_end(run_context)

        def on_train_end(self, run_context: Any) -> None:
            checkpoint.on_train_end(run_context)

        @property
        def latest_ckpt_file_name(self) -> str:
            return str(checkpoint.latest_ckpt_file_name)

    return CheckpointCallback()


adapting.register(MindSpore())
