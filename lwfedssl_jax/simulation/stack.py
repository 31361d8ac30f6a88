"""Stacks several runs in one program: arrays have a leading axis over runs, or none for a single run.

This is the only module that distinguishes the two cases.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwfedssl_jax import tree
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.tree import Tree


class Stack(NamedTuple):
    """``size`` runs of the same shapes on one mesh."""

    size: int
    mesh: Mesh

    @property
    def is_single(self) -> bool:
        """Whether there is only one run, and thus no axis over runs."""
        return self.size == 1

    def place(self, host: Tree) -> Tree:
        """Host arrays on all devices, the same on each."""
        return placer(self.mesh, PartitionSpec())(host)

    def gather(self, runs: Sequence[Tree]) -> Tree:
        """Each run's arrays, stacked, on all devices."""
        host = jax.device_get(runs)
        return self.place(host[0] if self.is_single else tree.stack(host))

    def select(self, number: int, stacked: Tree) -> Tree:
        """One run's part of stacked arrays."""
        return stacked if self.is_single else jax.tree.map(lambda leaf: leaf[number], stacked)

    def spec(self, spec: PartitionSpec) -> PartitionSpec:
        """The partition of a stacked array whose parts have ``spec``."""
        return spec if self.is_single else PartitionSpec(None, *spec)

    def vmap(self, f: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any = 0) -> Callable[..., Any]:
        """``f`` for all runs at once."""
        return f if self.is_single else jax.vmap(f, in_axes, out_axes, axis_size=self.size)

    def shapes(self, one: Tree, *lanes: int) -> Tree:
        """Shapes of stacked arrays, from those of one run (and of one lane, if ``lanes`` says how many there are)."""
        leading = lanes if self.is_single else (self.size, *lanes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *np.shape(x)), x.dtype), one)

    def abstract(self, shapes: Tree, spec: PartitionSpec) -> Tree:
        """Shapes of arrays, placed on the mesh with a partition."""
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
