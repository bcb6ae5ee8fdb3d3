"""Checkpoints of parallel training jobs: saved by MPI ranks, published atomically, restored on any number of them."""

from parckpt import sharding as _sharding  # noqa: F401  # gives Shard.stack its communication
from parckpt.browse import (
    Checkpoint,
    CheckpointInfo,
    inspect,
    latest_checkpoint,
    list_checkpoints,
    open_checkpoint,
)
from parckpt.checkpointer import ModelCheckpoint
from parckpt.comm.base import Communicator
from parckpt.comm.launch import SELF
from parckpt.core.clock import Clock
from parckpt.core.config import CheckpointConfig
from parckpt.core.leaves import Leaf, PerRank, Shard, Spec
from parckpt.core.shards import flat_shards
from parckpt.core.state import State
from parckpt.core.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps
from parckpt.core.version import VERSION
from parckpt.engine.progress import Progress
from parckpt.errors import (
    CheckpointExistsError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    ChecksumError,
    ConfigError,
    ConfigTypeError,
    ConfigWarning,
    FormatError,
    IntegrityError,
    InternalError,
    LayoutError,
    LockedError,
    NoSpaceError,
    ParckptError,
    ParckptWarning,
    RankError,
    SaveInProgressError,
    StateMismatchError,
    StateWarning,
    StepMismatchError,
    StorageError,
    SyncError,
    TimeoutExpiredError,
    TruncatedError,
    UnsupportedVersionError,
)
from parckpt.loadfile import load_checkpoint
from parckpt.savefile import save_checkpoint

__version__ = VERSION

__all__ = [
    "SELF",
    "AtSteps",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointExistsError",
    "CheckpointGoneError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "ChecksumError",
    "Clock",
    "Communicator",
    "ConfigError",
    "ConfigTypeError",
    "ConfigWarning",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "FormatError",
    "IntegrityError",
    "InternalError",
    "LayoutError",
    "Leaf",
    "LockedError",
    "ModelCheckpoint",
    "NoSpaceError",
    "ParckptError",
    "ParckptWarning",
    "PerRank",
    "Progress",
    "RankError",
    "SaveInProgressError",
    "Shard",
    "Spec",
    "State",
    "StateMismatchError",
    "StateWarning",
    "StepMismatchError",
    "StorageError",
    "SyncError",
    "TimeoutExpiredError",
    "TruncatedError",
    "UnsupportedVersionError",
    "flat_shards",
    "inspect",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
