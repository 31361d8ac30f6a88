"""Which client owns which training example.

A client costs a few integers: its number of examples, and where they begin in one common
order, or nothing where they are drawn from its number when they are needed.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from lwfedssl_jax.config import ConfigError, PartitionConfig, choose

SERVER_STREAM = 3  # of the seed in NumPy's generators; 0 is the clients'


class Population(Sequence[np.ndarray]):
    """The clients: ``population[i]`` are client i's example indices.

    Attributes:
      sizes: N, number of examples of each client.
    """

    def __init__(self, sizes_N: np.ndarray, examples: Callable[[int], np.ndarray]) -> None:
        self.sizes = sizes_N
        self._examples = examples

    @classmethod
    def disjoint(cls, order: np.ndarray, sizes_N: np.ndarray) -> "Population":
        """Each client owns the next ``sizes_N[i]`` entries of ``order``."""
        ends = np.cumsum(sizes_N)
        return cls(sizes_N, lambda i: order[ends[i] - sizes_N[i] : ends[i]])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # single clients only
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._examples(i)


def partition(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """The clients of a config.

    ``iid`` deals a random permutation out evenly. ``dirichlet`` gives each class to the
    clients in shares drawn from Dirichlet(beta) (Hsu et al., 2019, arXiv 1909.06335, by
    class); clients left empty then take one example from the largest client, unless
    ``allow_empty``. Both leave every example on exactly one client. ``shared`` lets every
    client draw its own from all examples, so that there may be more clients than examples.
    What the server holds (``server_examples``) is dealt to nobody.

    Raises:
      ConfigError: no such kind; more clients than examples, unless ``allow_empty`` or ``shared``; ``shared``
        clients of more examples than there are; see ``server_examples``.
    """
    kind, held = choose("partition.kind", config.kind, PARTITIONS), server_examples(config, labels_N, seed)
    examples = len(labels_N) - len(held)
    besides = f" besides the server's {len(held)}" if len(held) else ""
    if config.kind == "shared" and config.examples_per_client > examples:
        raise ConfigError(
            f"partition.examples_per_client: {config.examples_per_client} is more than the data set has{besides}; "
            f"accepted: 1 to {examples}"
        )
    if config.kind != "shared" and config.clients > examples and not config.allow_empty:
        raise ConfigError(
            f"partition.clients: {config.clients} clients cannot share {examples} examples{besides}; "
            f"accepted: 1 to {examples}, or partition.allow_empty, or partition.kind shared"
        )
    if not len(held):
        return kind(config, labels_N, seed)
    rest = np.delete(np.arange(len(labels_N)), held)
    clients = kind(config, labels_N[rest], seed)
    return Population(clients.sizes, lambda i: rest[clients[i]])


def server_examples(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> np.ndarray:
    """The examples that the server holds and no client owns: ``server_share`` of all at random, in order.

    Raises:
      ConfigError: the share leaves nothing to the clients, or is fewer than two examples but not 0.
    """
    share, examples = config.server_share, len(labels_N)
    held = round(share * examples)
    if share and not 2 <= held < examples:
        raise ConfigError(
            f"partition.server_share: {share} gives the server {held} of {examples} examples; "
            f"accepted: 0, or a share of at least 2 examples that leaves the clients some"
        )
    return np.sort(np.random.default_rng([seed, SERVER_STREAM]).choice(examples, held, replace=False))


def iid(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """Equal shares (to within one example) of a random permutation."""
    n, clients = len(labels_N), config.clients
    sizes = np.full(clients, n // clients, np.int32)
    sizes[: n % clients] += 1
    return Population.disjoint(np.random.default_rng([seed, 0]).permutation(n), sizes)


def dirichlet(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """Every class split over the clients in shares drawn from a symmetric Dirichlet(beta)."""
    rng = np.random.default_rng([seed, 0])
    orders, owners = [], []
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        # Gamma draws in log space: with a tiny beta the plain Dirichlet underflows to NaN.
        log_gamma = np.log(rng.gamma(config.beta + 1, size=config.clients))
        log_gamma += np.log(rng.uniform(size=config.clients)) / config.beta
        shares = np.exp(log_gamma - log_gamma.max())
        cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
        orders.append(members)
        owners.append(np.searchsorted(cuts, np.arange(len(members)), side="right"))
    owner = np.concatenate(owners)
    by_client = np.argsort(owner, kind="stable")
    order, owner = np.concatenate(orders)[by_client], owner[by_client]
    if not config.allow_empty:
        _fill_empty(owner, config.clients)
    return Population.disjoint(
        order[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=config.clients).astype(np.int32)
    )


def _fill_empty(owner: np.ndarray, clients: int) -> None:
    """Give each client without examples the last one of the then largest client, in place; ``owner`` is sorted."""
    sizes = np.bincount(owner, minlength=clients)
    last = np.cumsum(sizes) - 1
    largest = [(-size, client) for client, size in enumerate(sizes.tolist())]
    heapq.heapify(largest)
    for empty in np.flatnonzero(sizes == 0):
        size, donor = heapq.heappop(largest)
        owner[last[donor]] = empty
        last[donor] -= 1
        heapq.heappush(largest, (size + 1, donor))


def shared(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """Client i draws its examples from all, without repeats, by its own number: nothing is stored but sizes.

    Sizes are log-normal around ``examples_per_client`` (their median) with ``size_sigma``.
    """
    spread = np.exp(config.size_sigma * np.random.default_rng([seed, 0]).standard_normal(config.clients))
    sizes = np.clip(np.round(config.examples_per_client * spread), 1, len(labels_N)).astype(np.int32)

    def examples(i: int) -> np.ndarray:
        return np.random.default_rng([seed, 0, i]).choice(len(labels_N), sizes[i], replace=False)

    return Population(sizes, examples)


PARTITIONS = {"iid": iid, "dirichlet": dirichlet, "shared": shared}
