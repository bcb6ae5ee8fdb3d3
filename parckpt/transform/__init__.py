"""MindSpore's functions for checkpoints of many ranks: merge them, cut them anew, change their format.

Same names, arguments and results, on any MPI ranks: the heavy ones take ``comm`` and share the files to write. They
stream: no file and no tensor is ever held in memory as a whole.
"""

from parckpt.transform.checkpoints import transform_checkpoint_by_rank, transform_checkpoints
from parckpt.transform.distributed import load_distributed_checkpoint
from parckpt.transform.formats import ckpt_to_safetensors, load_segmented_checkpoints, safetensors_to_ckpt
from parckpt.transform.merging import merge_sliced_parameter
from parckpt.transform.ranks import rank_list_for_transform
from parckpt.transform.unified import unified_safetensors

__all__ = [
    "ckpt_to_safetensors",
    "load_distributed_checkpoint",
    "load_segmented_checkpoints",
    "merge_sliced_parameter",
    "rank_list_for_transform",
    "safetensors_to_ckpt",
    "transform_checkpoint_by_rank",
    "transform_checkpoints",
    "unified_safetensors",
]
