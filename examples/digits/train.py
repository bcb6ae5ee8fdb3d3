"""Train a classifier of handwritten digits on several ranks, and survive being killed at any moment.

    mpiexec -n 4 python -m mpi4py examples/digits/train.py --directory ckpts

The ranks form a mesh, data x tensor: those in one row share the samples of a batch and hold different hidden units,
those in one column hold the same units and see different samples. Kill the job and start it again, with another number
of ranks if you like: it goes on from the last checkpoint and ends with the same weights, bit for bit.

Why bit for bit. A floating-point sum depends on the order of its terms, so nothing here may depend on the number of
ranks, only *where* something is computed may:

* A batch is always MICRO_BATCHES blocks of SAMPLES samples, the hidden layer always PARTS blocks of UNITS units, and a
  rank computes whole (block of samples, block of units) pairs. So every matrix product has the same shape whatever the
  number of ranks, and its operands lie in memory alike: BLAS chooses its order of summation by these.
* MPI carries partial results and adds none: every rank adds them up itself, in the order of the blocks. (The order
  inside Allreduce depends on the number of ranks.)
* What follows the sums works element by element with + - * / and sqrt, which IEEE 754 rounds in exactly one way.
* Which samples come next is decided by one generator, whose state is part of the checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy comes: the ranks share the cores already

import numpy as np
from mpi4py import MPI

import parckpt

MICRO_BATCHES, SAMPLES = 6, 16
PARTS, UNITS = 6, 64
BATCH, HIDDEN = MICRO_BATCHES * SAMPLES, PARTS * UNITS
PIXELS, CLASSES = 64, 10
TEST = 288  # samples kept for the test, a multiple of SAMPLES
RATE, BETA1, BETA2, EPSILON = 4e-3, 0.9, 0.999, 1e-8  # of Adam


def load():
    """1797 images of 8 x 8 pixels and their digits, which come with scikit-learn."""
    from sklearn.datasets import load_digits  # here, so that just one rank pays for the import

    digits = load_digits()
    shuffled = np.random.default_rng(0).permutation(len(digits.data))  # the file is sorted by writer
    return digits.data[shuffled] / 16.0, digits.target[shuffled]


def share(total, index, count):
    """Blocks of one rank among `count`: consecutive, so that the ranks' blocks in turn are all blocks in order."""
    return range(total * index // count, total * (index + 1) // count)


def in_order(axis, mine):
    """Lists of all ranks of an axis, one after the other. Collective."""
    return [block for part in axis.allgather(mine) for block in part]


def block(array, part):
    """One block of the rows that this rank holds."""
    return array[part * UNITS : (part + 1) * UNITS]


def hidden_and_scores(model, samples, parts, units_axis):
    """Hidden activations of this rank's parts, and the class scores, to which all parts contribute. Collective."""
    hidden = [np.maximum(samples @ block(model["w1"], p).T + block(model["b1"], p), 0.0) for p in range(len(parts))]
    partial = [hidden[p] @ block(model["w2"], p) for p in range(len(parts))]
    return hidden, sum(in_order(units_axis, partial)) + model["b2"]


def gradient(model, samples, labels, parts, units_axis):
    """Loss and gradient of one micro-batch, for the units that this rank holds. Collective over the units' axis."""
    hidden, scores = hidden_and_scores(model, samples, parts, units_axis)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances = odds / odds.sum(axis=1, keepdims=True)
    loss = -np.log(chances[np.arange(SAMPLES), labels]).sum()
    wrong = (chances - np.eye(CLASSES)[labels]) / BATCH
    back = [(wrong @ block(model["w2"], p).T) * (hidden[p] > 0) for p in range(len(parts))]
    return {
        "w1": np.concatenate([b.T @ samples for b in back]),
        "b1": np.concatenate([b.sum(axis=0) for b in back]),
        "w2": np.concatenate([h.T @ wrong for h in hidden]),
        "b2": wrong.sum(axis=0),
        "loss": loss / BATCH,
    }


def adam(model, moments, grads, step):
    """One step of Adam, in place: a checkpoint holds these very arrays."""
    for name, weights in model.items():
        grad, mean, square = grads[name], moments["mean"][name], moments["square"][name]
        mean += (1 - BETA1) * (grad - mean)
        square += (1 - BETA2) * (grad * grad - square)
        weights -= RATE * (mean / (1 - BETA1**step)) / (np.sqrt(square / (1 - BETA2**step)) + EPSILON)


def accuracy(model, images, labels, parts, units_axis):
    """Share of the samples that are recognised. Collective over the units' axis."""
    blocks = [images[start : start + SAMPLES] for start in range(0, len(images), SAMPLES)]
    scores = [hidden_and_scores(model, samples, parts, units_axis)[1] for samples in blocks]
    return float(np.mean(np.concatenate(scores).argmax(axis=1) == labels))


def main():
    parser = argparse.ArgumentParser(description="Train on handwritten digits, with checkpoints.")
    parser.add_argument("--directory", default="ckpts")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--tensor", type=int, help="ranks that split the hidden units (default: 2 if even, else 1)")
    options = parser.parse_args()

    # The mesh, and what of the work is this rank's.
    world = MPI.COMM_WORLD
    tensor = options.tensor or (2 if world.size % 2 == 0 else 1)
    if world.size % tensor or tensor > PARTS or world.size // tensor > MICRO_BATCHES:
        raise SystemExit(f"{world.size} ranks do not form a mesh with {tensor} for the hidden units")
    row, column = divmod(world.rank, tensor)
    units_axis, samples_axis = world.Split(row, column), world.Split(column, row)
    parts = share(PARTS, column, tensor)
    micro_batches = share(MICRO_BATCHES, row, world.size // tensor)
    mine = slice(parts.start * UNITS, parts.stop * UNITS)
    if world.rank == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        print(f"{world.size} ranks: {world.size // tensor} for the samples x {tensor} for the hidden units", flush=True)

    images, labels = world.bcast(load() if world.rank == 0 else None)
    count = len(images) - TEST

    # Everything that makes the next step what it is. All ranks draw the same numbers and keep their units.
    rng = np.random.default_rng(1)
    model = {
        "w1": rng.normal(0.0, 0.15, (HIDDEN, PIXELS))[mine].copy(),
        "b1": np.zeros(HIDDEN)[mine].copy(),
        "w2": rng.normal(0.0, 0.05, (HIDDEN, CLASSES))[mine].copy(),
        "b2": np.zeros(CLASSES),
    }
    moments = {kind: {name: np.zeros_like(array) for name, array in model.items()} for kind in ("mean", "square")}
    loader = {"order": rng.permutation(count), "position": 0, "rng": rng.bit_generator.state}
    blocks_done = np.zeros(1, np.int64)

    def shards(arrays):
        """Tell where this rank's rows lie in the whole tensor; b2 is whole on every rank."""
        split = {name: array for name, array in arrays.items() if name != "b2"}
        return arrays | {
            name: parckpt.Shard(array, global_shape=(HIDDEN, *array.shape[1:]), offsets=(mine.start, 0)[: array.ndim])
            for name, array in split.items()
        }

    def pool(all_values, rank, size):
        """Blocks that an earlier, other number of ranks computed: rank 0 takes all of them over."""
        return sum(all_values) if rank == 0 else np.zeros(1, np.int64)

    state = {
        "model": shards(model),
        "adam": {kind: shards(arrays) for kind, arrays in moments.items()},
        "loader": loader,
        "blocks_done": parckpt.PerRank(blocks_done, on_resize=pool),
    }
    config = parckpt.CheckpointConfig(
        save_checkpoint_steps=options.save_every, keep_checkpoint_max=3, remove_redundancy=True
    )
    per_epoch = count // BATCH
    with parckpt.ModelCheckpoint("digits", options.directory, config, comm=world, steps_per_epoch=per_epoch) as ckpt:
        progress = ckpt.restore(state)  # fills the arrays in place; step 0 if there is nothing yet
        rng.bit_generator.state = loader["rng"]
        if world.rank == 0:
            print(f"starting after step {progress.step}", flush=True)
        for step in range(progress.step + 1, options.steps + 1):
            batch = loader["order"][loader["position"] : loader["position"] + BATCH]
            partial = []
            for number in micro_batches:
                chosen = batch[number * SAMPLES : (number + 1) * SAMPLES]
                partial.append(gradient(model, images[chosen], labels[chosen], parts, units_axis))
            partial = in_order(samples_axis, partial)
            grads = {name: sum(one[name] for one in partial) for name in partial[0]}
            with ckpt.updating(step):  # what is saved changes only in here
                adam(model, moments, grads, step)
                blocks_done += len(parts) * len(micro_batches)
                loader["position"] += BATCH
                if loader["position"] + BATCH > count:
                    loader.update(order=rng.permutation(count), position=0)
                    loader["rng"] = rng.bit_generator.state
            if world.rank == 0:
                print(f"step {step}  loss {grads['loss']:.6f}", flush=True)
            ckpt.step_end(state, step)  # saves when it is due
            if ckpt.should_exit:
                break
    total = world.allreduce(int(blocks_done[0]))
    right = accuracy(model, images[-TEST:], labels[-TEST:], parts, units_axis)
    if world.rank == 0:
        print(f"done: {100 * right:.2f} % of {TEST} unseen digits recognised, {total} blocks computed", flush=True)
    sys.exit(ckpt.exit_code)


if __name__ == "__main__":
    main()
