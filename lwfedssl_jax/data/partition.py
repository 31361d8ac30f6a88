"""Which client owns which training example.

A client takes a few integers: its number of examples, and where they begin in a common order, unless they are drawn
from the client's number when they are needed.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from lwfedssl_jax.config import ConfigError, PartitionConfig, choose
from lwfedssl_jax.system import seeds

# ``(clients_Mx1, positions_MxB) -> examples_MxB``: indices of the examples that clients have at positions.
Examples = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Population(Sequence[np.ndarray]):
    """The clients: ``population[i]`` are client i's example indices.

    Attributes:
      sizes: N, the number of examples of each client.
      at: the examples of any clients at any positions, 0 to the client's size - 1.
      own: N, which of the data set's own clients each is; None if they are not its clients.
      is_here: whether the examples are on this machine.
    """

    is_here = True

    def __init__(self, sizes_N: np.ndarray, at: Examples) -> None:
        self.sizes, self.at = sizes_N, at
        self.own: np.ndarray | None = None

    @classmethod
    def elsewhere(cls, sizes_N: np.ndarray) -> "Population":
        """Clients whose examples are not here: only their numbers are known."""

        def at(clients: np.ndarray, positions: np.ndarray) -> np.ndarray:
            raise LookupError("the clients' images are not on this machine")

        population = cls(sizes_N, at)
        population.is_here = False
        return population

    @classmethod
    def disjoint(cls, order: np.ndarray, sizes_N: np.ndarray) -> "Population":
        """Each client owns the next ``sizes_N[i]`` entries of ``order``."""
        starts = np.cumsum(sizes_N) - sizes_N
        return cls(sizes_N, lambda clients, positions: order[starts[clients] + positions])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # single clients only
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.at(np.array([[i]]), np.arange(self.sizes[i])[None])[0]


def partition(
    config: PartitionConfig, labels_N: np.ndarray, seed: int, clients_N: np.ndarray | None = None
) -> Population:
    """Distribute the examples over clients, except for those that the server holds (``server_examples``).

    ``iid`` deals out a random permutation in equal shares, ``quantity`` in shares drawn from Dirichlet(beta), and
    ``dirichlet`` does this with each class (Hsu et al., 2019, arXiv 1909.06335, by class). ``shards`` sorts the
    examples by class, cuts them into equal pieces and gives each client a few (McMahan et al., 2017, arXiv
    1602.05629). All these give every example to exactly one client; a client left empty then takes one example from
    the largest client, unless ``allow_empty``. ``natural`` takes the data set's clients, or some of them at random.
    With ``shared`` every client draws its own from all examples, so that there may be more clients than examples.

    Args:
      config: names the kind.
      labels_N: of the examples.
      seed: of all that is drawn.
      clients_N: the data set's own client of each example, if it has clients.

    Raises:
      ConfigError: there is no such kind; there are more clients, or shards, than examples, unless ``allow_empty`` or
        ``shared``; ``shared`` clients have more examples than there are; ``natural`` without clients, or with more
        than there are; see ``server_examples``.
    """
    distribute, held = choose("partition.kind", config.kind, PARTITIONS), server_examples(config, labels_N, seed)
    if config.kind == "natural" and clients_N is None:
        others = ", ".join(name for name in PARTITIONS if name != "natural")
        raise ConfigError(
            f"partition.kind: natural needs a data set that has the client of each image (a feature of tfds, "
            f"clients.csv of a folder; data.client_column names it); accepted here: {others}"
        )
    if config.kind in ("dirichlet", "shards") and (labels_N < 0).all():
        raise ConfigError(
            f"partition.kind: {config.kind} needs labels, which no training image has; accepted here: iid, quantity, "
            "natural, shared"
        )
    by_N = clients_N if config.kind == "natural" and clients_N is not None else labels_N
    rest = np.delete(np.arange(len(labels_N)), held)
    if len(held):
        by_N = by_N[rest]
    _check_counts(config, by_N, f" apart from the server's {len(held)}" if len(held) else "")
    clients = distribute(config, by_N, seed)
    return Population(clients.sizes, lambda i, at: rest[clients.at(i, at)]) if len(held) else clients


def _check_counts(config: PartitionConfig, by_N: np.ndarray, apart: str) -> None:
    """Refuse more clients, shards or examples per client than there are.

    Args:
      config: names the kind.
      by_N: each example's label or client, as the kind gets it.
      apart: what examples are not counted, for the message.
    """
    examples, shards = len(by_N), config.clients * config.shards_per_client
    if config.kind == "shared":
        if config.examples_per_client > examples:
            raise ConfigError(
                f"partition.examples_per_client: {config.examples_per_client} is more than the data set has{apart}; "
                f"accepted: 1 to {examples}"
            )
    elif config.kind == "natural":
        if config.clients > (there := len(np.unique(by_N))):
            raise ConfigError(
                f"partition.clients: {config.clients} is more than the data set's own {there} clients with "
                f"images{apart}; accepted: 1 to {there}"
            )
    elif config.clients > examples and not config.allow_empty:
        raise ConfigError(
            f"partition.clients: {config.clients} clients are more than the {examples} examples{apart}; "
            f"accepted: 1 to {examples}, or partition.allow_empty, or partition.kind shared"
        )
    elif config.kind == "shards" and shards > examples and not config.allow_empty:
        raise ConfigError(
            f"partition.shards_per_client: {config.shards_per_client} for each of {config.clients} clients makes more "
            f"shards than {examples} examples{apart}; accepted: 1 to {examples // config.clients}, or "
            f"partition.allow_empty"
        )


def server_examples(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> np.ndarray:
    """The indices of the examples that the server holds: ``server_share`` of all at random, in order.

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
    return np.sort(seeds.rng(seed, seeds.RngTag.SERVER_IMAGES).choice(examples, held, replace=False))


def iid(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """Shares of a random permutation: equal to within one example, or log-normal with ``size_sigma``."""
    n, clients, rng = len(labels_N), config.clients, seeds.rng(seed, seeds.RngTag.PARTITION)
    order = rng.permutation(n)
    if config.size_sigma:
        return _deal_out(config, order, _assign_owners(n, config.size_sigma * rng.standard_normal(clients)))
    sizes = np.full(clients, n // clients, np.int32)
    sizes[: n % clients] += 1
    return Population.disjoint(order, sizes)


def quantity(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """A random permutation in shares drawn from a symmetric Dirichlet(beta): unequal sizes, but no skew of classes."""
    return dirichlet(config, np.zeros_like(labels_N), seed)


def dirichlet(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """Every class split over the clients in shares drawn from a symmetric Dirichlet(beta)."""
    rng = seeds.rng(seed, seeds.RngTag.PARTITION)
    orders, owners = [], []
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        # Gamma draws in log space: with a tiny beta the plain Dirichlet underflows to NaN.
        log_gamma = np.log(rng.gamma(config.beta + 1, size=config.clients))
        log_gamma += np.log(rng.uniform(size=config.clients)) / config.beta
        orders.append(members)
        owners.append(_assign_owners(len(members), log_gamma))
    return _deal_out(config, np.concatenate(orders), np.concatenate(owners))


def shards(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> Population:
    """``shards_per_client`` equal pieces for each client, at random, of all examples sorted by class."""
    rng = seeds.rng(seed, seeds.RngTag.PARTITION)
    shuffled = rng.permutation(len(labels_N))
    order = shuffled[np.argsort(labels_N[shuffled], kind="stable")]
    pieces, n = config.clients * config.shards_per_client, len(order)
    if pieces > n:  # each example is a piece, and all other pieces are empty
        return _deal_out(config, order, rng.choice(pieces, n, replace=False) // config.shards_per_client)
    owner_of_piece = rng.permutation(pieces) // config.shards_per_client
    return _deal_out(config, order, owner_of_piece[np.arange(n) * pieces // n])


def natural(config: PartitionConfig, clients_N: np.ndarray, seed: int) -> Population:
    """The data set's own clients, ``config.clients`` of them at random, in order; the others' examples are not used."""
    present, owner = np.unique(clients_N, return_inverse=True)
    chosen = seeds.rng(seed, seeds.RngTag.PARTITION).choice(len(present), config.clients, replace=False)
    sizes, by_client = np.bincount(owner), np.argsort(owner, kind="stable")
    chosen = np.sort(chosen)
    clients = Population.disjoint(by_client[np.isin(owner[by_client], chosen)], sizes[chosen].astype(np.int32))
    clients.own = present[chosen]
    return clients


def _assign_owners(examples: int, log_weights: np.ndarray) -> np.ndarray:
    """The client of each of ``examples`` in a row, in shares in proportion to the clients' weights."""
    weights = np.exp(log_weights - log_weights.max())
    cuts = np.round(np.cumsum(weights / weights.sum())[:-1] * examples).astype(int)
    return np.searchsorted(cuts, np.arange(examples), side="right")


def _deal_out(config: PartitionConfig, order: np.ndarray, owner: np.ndarray) -> Population:
    """The population whose client ``owner[i]`` has example ``order[i]``; empty clients get one, unless allowed."""
    by_client = np.argsort(owner, kind="stable")
    order, owner = order[by_client], owner[by_client]
    if not config.allow_empty:
        _fill_empty(owner, config.clients)
    return Population.disjoint(
        order[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=config.clients).astype(np.int32)
    )


def _fill_empty(owner: np.ndarray, clients: int) -> None:
    """Give each client without examples the last one of the currently largest client; ``owner`` is sorted."""
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
    """Client i draws its examples from all, without repeats, by its own number: only sizes are stored.

    Sizes are log-normal around ``examples_per_client`` (their median) with ``size_sigma``.
    """
    spread = np.exp(config.size_sigma * seeds.rng(seed, seeds.RngTag.PARTITION).standard_normal(config.clients))
    sizes = np.clip(np.round(config.examples_per_client * spread), 1, len(labels_N)).astype(np.int32)
    return Population(
        sizes, lambda i, at: seeds.permuted(seeds.hashes(seed, seeds.RngTag.SHARED, i), at, len(labels_N))
    )


PARTITIONS = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "natural": natural,
    "shared": shared,
}
