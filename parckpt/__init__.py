"""Checkpoints of parallel training jobs: saved by MPI ranks, published atomically, restored on any number of them."""

from parckpt import sharding as _sharding  # noqa: F401  # gives Shard.stack its communication
from parckpt.adapters import mindspore as _mindspore  # noqa: F401  # says what its tensors and networks stand for
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
from parckpt.core.mesh import Layout
from parckpt.core.shards import flat_shards
from parckpt.core.state import State
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.core.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps
from parckpt.core.version import VERSION
from parckpt.engine.progress import Progress
from parckpt.errors import (
    CheckpointExistsError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    ChecksumError,
    ConfigError,
    ConfigKeyError,
    ConfigTypeError,
    ConfigWarning,
    DirectoryNotFoundError,
    FileInTheWayError,
    FormatError,
    IntegrityError,
    InternalError,
    LayoutError,
    LockedError,
    NoSpaceError,
    NotAFileError,
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
from parckpt.netload import load_param_into_net
from parckpt.savefile import save_checkpoint
from parckpt.strategies import (
    get_ckpt_path_with_strategy,
    load_strategy,
    merge_pipeline_strategys,
    restore_group_info_list,
    save_strategy,
)
from parckpt.transform import (
    ckpt_to_safetensors,
    load_distributed_checkpoint,
    load_segmented_checkpoints,
    merge_sliced_parameter,
    rank_list_for_transform,
    safetensors_to_ckpt,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)

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
    "ConfigKeyError",
    "ConfigTypeError",
    "ConfigWarning",
    "DirectoryNotFoundError",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "FileInTheWayError",
    "FormatError",
    "IntegrityError",
    "InternalError",
    "Layout",
    "LayoutError",
    "Leaf",
    "LockedError",
    "ModelCheckpoint",
    "NoSpaceError",
    "NotAFileError",
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
    "Strategy",
    "SyncError",
    "TensorStrategy",
    "TimeoutExpiredError",
    "TruncatedError",
    "UnsupportedVersionError",
    "ckpt_to_safetensors",
    "flat_shards",
    "get_ckpt_path_with_strategy",
    "inspect",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_distributed_checkpoint",
    "load_param_into_net",
    "load_segmented_checkpoints",
    "load_strategy",
    "merge_pipeline_strategys",
    "merge_sliced_parameter",
    "open_checkpoint",
    "rank_list_for_transform",
    "restore_group_info_list",
    "safetensors_to_ckpt",
    "save_checkpoint",
    "save_strategy",
    "transform_checkpoint_by_rank",
    "transform_checkpoints",
    "unified_safetensors",
]
