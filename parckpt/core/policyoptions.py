"""The options of `CheckpointConfig` beyond MindSpore's that say when to save and what to keep: checked and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parckpt.core import checks, triggers
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["check", "check_metrics", "void"]


def check(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check each option by itself, then what goes together."""
    options = {
        "triggers": triggers.checked(given["triggers"]),
        "ephemeral_steps": _positive("ephemeral_steps", given["ephemeral_steps"]),
        "keep_every_n_steps": _positive("keep_every_n_steps", given["keep_every_n_steps"]),
        "keep_best": checks.count("keep_best", given["keep_best"]),
        "best_metric": given["best_metric"],
        "best_mode": checks.choice("best_mode", given["best_mode"], ("min", "max")),
        "time_to_live_s": given["time_to_live_s"],
    }
    if options["best_metric"] is not None:
        checks.text("best_metric", options["best_metric"])
    if options["time_to_live_s"] is not None:
        options["time_to_live_s"] = checks.seconds("time_to_live_s", options["time_to_live_s"])
    if options["keep_best"] and not options["best_metric"]:
        raise ConfigError(
            "keep_best needs best_metric: the name, among the metrics given to step_end, to compare by",
            parameter="best_metric",
        )
    return options


def _positive(name: str, value: Any) -> int | None:
    found: int | None = checks.count(name, value, least=1, none=True)
    return found


def void(options: Mapping[str, Any]) -> dict[str, bool]:
    """Messages about options without effect, each with whether it applies."""
    steps, ephemeral = options["save_checkpoint_steps"], options["ephemeral_steps"]
    return {
        f"ephemeral_steps={ephemeral} has no effect: save_checkpoint_steps={steps} saves at least as often": bool(
            steps and ephemeral and ephemeral >= steps
        ),
        f"best_metric={options['best_metric']!r} has no effect without keep_best": bool(
            options["best_metric"] and not options["keep_best"]
        ),
        'best_mode="max" has no effect without keep_best': (options["best_mode"] == "max" and not options["keep_best"]),
    }


def check_metrics(metrics: Any) -> dict[str, float]:
    """Metrics of a step as floats by name; what is no number is an error, NaN is a number."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigTypeError(f"metrics must be a mapping of names to numbers, not {type(metrics).__name__}")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if not isinstance(name, str):
            raise ConfigTypeError(f"names of metrics must be str, not {type(name).__name__}")
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ConfigTypeError(f"metrics[{name!r}] must be a number, not {type(value).__name__}")
        try:
            found[name] = float(value)
        except OverflowError:
            raise ConfigError(f"metrics[{name!r}] does not fit a float: {value}") from None
    return found
