"""Train with MindSpore on every rank of MPI, save together, restore, train on; print what the parameters are."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import nn, train

import parckpt


def model() -> Any:
    # Ranks that hold replicas must begin alike.
    net = nn.Dense(6, 4, weight_init=ms.Tensor(np.arange(24, dtype=np.float32).reshape(4, 6) / 24), bias_init="zeros")
    return train.Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), 0.01))


def data() -> Any:
    source = np.random.default_rng(5)
    rows = [(source.standard_normal(6).astype(np.float32), np.ones(4, np.float32)) for _ in range(8)]
    return ds.GeneratorDataset(rows, ["x", "y"], shuffle=False, num_parallel_workers=1).batch(2)


def digest(network: nn.Cell) -> str:
    parameters = sorted((parameter.name, parameter.asnumpy().tobytes()) for parameter in network.get_parameters())
    return hashlib.sha256(repr(parameters).encode()).hexdigest()[:16]


def main(directory: str) -> None:
    whole = model()
    whole.train(2, data())
    config = parckpt.CheckpointConfig(save_checkpoint_steps=4, remove_redundancy=True, ownership="mindspore")
    for epoch in (0, 1):
        part = model()
        with parckpt.ModelCheckpoint("net", directory, config) as ckpt:
            assert ckpt.restore(part.train_network).step == 4 * epoch
            part.train(1, data(), callbacks=ckpt.as_mindspore_callback())
    assert digest(part.train_network) == digest(whole.train_network)
    print(digest(part.train_network))


main(sys.argv[1])
