"""What server and devices send each other of a model, as flat bytes, of as many as ``costs.traffic`` counts.

The parameters of a stage, or of a frozen layer, follow each other in the order of their names, without the rows that a
stage does not use: little-endian, as they are or compressed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.method.compression import Message, Quantised, Sparse, kept_of, share_of
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import weights_of
from lwfedssl_jax.simulation.setup import Prepared, initial_params
from lwfedssl_jax.tree import Tree


class WireError(ValueError):
    """Bytes that are not what they should be."""


class Wire:
    """The bytes of a run's models.

    Args:
      run: prepared, with any data.
    """

    def __init__(self, run: Prepared) -> None:
        self._run = run
        self._shapes = jax.eval_shape(lambda: initial_params(run))
        self._share = share_of(run.config.federation.compression)

    def trainable(self, stage: Stage, params: Tree) -> bytes:
        """Return what a stage trains of all parameters, which are on the host."""
        return flatten(params, stage.trainable)

    def layer(self, number: int, params: Tree) -> bytes:
        """Return a layer, by its number from 1, of all parameters."""
        return flatten(params, self._layer_mask(number))

    def digest(self, number: int, content: bytes) -> str:
        """Return the SHA-256 of a layer with its number and the names, types and shapes of its parameters."""
        return hashlib.sha256(self.header(number) + content).hexdigest()

    def header(self, number: int) -> bytes:
        """Return a line that describes a layer: its number and its parameters."""
        mask = jax.tree.leaves(self._layer_mask(number))
        rows = [
            [jax.tree_util.keystr(path), int(np.sum(m)), str(x.dtype), list(x.shape[np.ndim(m) :])]
            for (path, x), m in zip(jax.tree.leaves_with_path(self._shapes), mask, strict=True)
            if np.any(m)
        ]
        return f"{json.dumps([number, rows])}\n".encode()

    def params(self, stage: Stage, trainable: bytes, layers: Mapping[int, bytes]) -> Tree:
        """Return all parameters, with zeros in place of those that were not sent.

        Args:
          stage: that they are for.
          trainable: as ``trainable`` returned it.
          layers: the stage's frozen layers, by number.

        Raises:
          WireError: there are too few bytes, or too many.
        """
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
        params = unflatten(trainable, stage.trainable, params)
        for number, content in layers.items():
            params = unflatten(content, self._layer_mask(number), params)
        return params

    def update(self, stage: Stage, trained: Tree) -> bytes:
        """Return what a device sends: the trained part of a stage's broadcast, or its compression's message."""
        present = self._present(stage)
        if not isinstance(trained, Message):
            return flatten(trained, present)
        weights, statistics = weights_of(present), {k: v for k, v in present.items() if k == "statistics"}
        if isinstance(trained.update, Quantised):
            update = flatten(trained.update.values, weights) + flatten(trained.update.scales, weights)
        else:
            update = self._sparse_bytes(stage, trained.update)
        return update + flatten(trained.statistics, statistics)

    def read_update(self, stage: Stage, content: bytes, sent: Tree) -> Tree:
        """Return what ``update`` made bytes of.

        Args:
          stage: in which a device was trained.
          content: as it was received.
          sent: the trainable part that was sent to it, on the host, in whose idle rows it has trained nothing.

        Raises:
          WireError: there are too few bytes, or too many, or they do not describe an update.
        """
        present = self._present(stage)
        if self._run.config.federation.compression == "none":
            return unflatten(content, present, sent)
        weights, statistics = weights_of(present), {k: v for k, v in present.items() if k == "statistics"}
        sent_statistics = {k: v for k, v in sent.items() if k == "statistics"}
        rest = size_of(sent_statistics, statistics)
        content, last = content[: len(content) - rest], content[len(content) - rest :]
        update: Quantised | Sparse
        if self._share is None:
            values, scales = jax.tree.map(_zeros_int8, weights_of(sent)), _scales_like(weights_of(sent), weights)
            size = size_of(values, weights)
            update = Quantised(unflatten(content[:size], weights, values), unflatten(content[size:], weights, scales))
        else:
            update = self._read_sparse(stage, content)
        return Message(update, unflatten(last, statistics, sent_statistics))

    def _layer_mask(self, number: int) -> Tree:
        return jax.tree.map(lambda n: np.asarray(n == number), self._run.layers)

    def _present(self, stage: Stage) -> Tree:
        """The rows of the trainable part that a stage uses."""
        return jax.tree.map(np.asarray, tree.present(self._shapes, stage.rows))

    def _real(self, stage: Stage) -> np.ndarray:
        """Positions of a stage's weights in those of its program, which may have idle rows."""
        shapes = jax.eval_shape(tree.take, self._shapes, stage.rows)
        each = zip(*map(jax.tree.leaves, (weights_of(shapes), weights_of(self._present(stage)))), strict=True)
        return np.flatnonzero(np.concatenate([np.broadcast_to(_rows(m, x.ndim), x.shape).ravel() for x, m in each]))

    def _sparse_bytes(self, stage: Stage, update: Sparse) -> bytes:
        real = self._real(stage)
        kept = kept_of(self._share or 0, len(real))
        values, positions = np.asarray(update.values)[:kept], np.asarray(update.positions)[:kept]
        used = np.isin(positions, real)  # of the others, in idle rows, the values are 0
        free = np.setdiff1d(real, positions[used])[: int((~used).sum())]
        order = np.argsort(at := np.searchsorted(real, np.concatenate([positions[used], free])))
        values, at = np.concatenate([values[used], values[~used]])[order], at[order]
        named = at.astype("<i4").tobytes()
        if (bits := -(-len(real) // 8)) < len(named):
            mask = np.zeros(len(real), bool)
            mask[at] = True
            named = np.packbits(mask).tobytes()
            assert len(named) == bits
        return _little(values).tobytes() + named

    def _read_sparse(self, stage: Stage, content: bytes) -> Sparse:
        real = self._real(stage)
        kept = kept_of(self._share or 0, len(real))
        bits = -(-len(real) // 8)
        named = min(4 * kept, bits)
        if len(content) != 4 * kept + named:
            raise WireError(f"an update of {len(content)} bytes where {4 * kept + named} were expected")
        values = np.frombuffer(content, "<f4", kept)
        if bits < 4 * kept:
            at = np.flatnonzero(np.unpackbits(np.frombuffer(content, np.uint8, offset=4 * kept), count=len(real)))
        else:
            at = np.frombuffer(content, "<i4", offset=4 * kept).astype(np.int64)
        if len(at) != kept or len(np.unique(at)) != kept or (at < 0).any() or (at >= len(real)).any():
            raise WireError("an update whose positions are not those of its values")
        size = sum(x.size for x in jax.tree.leaves(weights_of(jax.eval_shape(tree.take, self._shapes, stage.rows))))
        room = kept_of(self._share or 0, size) - kept  # of the program, which has idle rows
        values = np.concatenate([values, np.zeros(room, np.float32)])
        positions = np.concatenate([real[at], np.full(room, size)])  # the last ones are beyond the end
        return Sparse(*map(jnp.asarray, (values, positions.astype(np.int32))))


def flatten(params: Tree, kept: Tree) -> bytes:
    """Return the rows that ``kept`` names of each leaf, one leaf after the other.

    Args:
      params: on the host.
      kept: of the same structure: a boolean for each leaf, or a vector of them for its rows.
    """
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(kept), strict=True)
    return b"".join(_little(np.asarray(x)[_index(m)]).tobytes() for x, m in leaves if np.any(m))


def unflatten(content: bytes, kept: Tree, into: Tree) -> Tree:
    """Return ``into`` with the rows that ``kept`` names replaced by those that ``flatten`` returned.

    Raises:
      WireError: there are too few bytes, or too many.
    """
    if len(content) != (size := size_of(into, kept)):
        raise WireError(f"{len(content)} bytes of parameters where {size} were expected")
    leaves, structure = jax.tree.flatten(into)
    done = 0
    for i, m in enumerate(jax.tree.leaves(kept)):
        if np.any(m):
            leaves[i] = np.array(leaves[i])
            part = leaves[i][_index(m)]
            read = np.frombuffer(content, part.dtype.newbyteorder("<"), part.size, done).reshape(part.shape)
            leaves[i][_index(m)], done = read, done + read.nbytes
    return jax.tree.unflatten(structure, leaves)


def size_of(params: Tree, kept: Tree) -> int:
    """Return how many bytes ``flatten`` returns; of ``params``, the shapes are enough."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(kept), strict=True)
    return sum(int(np.prod(x.shape)) // max(np.size(m), 1) * int(np.sum(m)) * x.dtype.itemsize for x, m in leaves)


def _index(kept: Any) -> Any:
    return np.flatnonzero(kept) if np.ndim(kept) else ...


def _little(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, x.dtype.newbyteorder("<"))


def _rows(mask: np.ndarray, dimensions: int) -> np.ndarray:
    return np.expand_dims(mask, tuple(range(np.ndim(mask), dimensions)))


def _zeros_int8(x: Any) -> np.ndarray:
    return np.zeros(x.shape, np.int8)


def _scales_like(weights: Tree, present: Tree) -> Tree:
    """Zeros in the shapes of the scales of int8: one for each matrix."""
    return jax.tree.map(lambda x, m: np.zeros(np.shape(m) + (1,) * (x.ndim - np.ndim(m)), np.float32), weights, present)
