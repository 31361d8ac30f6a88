"""Which client owns which training example."""

import numpy as np

from lwfedssl_jax.config import ConfigError, PartitionConfig


def partition(config: PartitionConfig, labels_N: np.ndarray, seed: int) -> list[np.ndarray]:
    """Each client's example indices; every example is on exactly one client.

    ``iid`` deals a random permutation out evenly. ``dirichlet`` gives each class to the
    clients in shares drawn from Dirichlet(beta) (Hsu et al., 2019, arXiv 1909.06335, by
    class); clients left empty then take one example from the largest client, unless
    ``allow_empty``.

    Raises:
      ConfigError: more clients than examples, unless ``allow_empty``.
    """
    if config.clients > len(labels_N) and not config.allow_empty:
        raise ConfigError(
            f"partition.clients: {config.clients} clients cannot share {len(labels_N)} examples; "
            f"accepted: 1 to {len(labels_N)}, or partition.allow_empty"
        )
    rng = np.random.default_rng([seed, 0])
    clients = PARTITIONS[config.kind](rng, labels_N, config)
    if not config.allow_empty:
        _fill_empty(clients)
    return clients


def iid(rng: np.random.Generator, labels_N: np.ndarray, config: PartitionConfig) -> list[np.ndarray]:
    """Equal shares (to within one example) of a random permutation."""
    return np.array_split(rng.permutation(len(labels_N)), config.clients)


def dirichlet(rng: np.random.Generator, labels_N: np.ndarray, config: PartitionConfig) -> list[np.ndarray]:
    """Every class split over the clients in shares drawn from a symmetric Dirichlet(beta)."""
    parts: list[list[np.ndarray]] = [[] for _ in range(config.clients)]
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        # Gamma draws in log space: with a tiny beta the plain Dirichlet underflows to NaN.
        log_gamma = np.log(rng.gamma(config.beta + 1, size=config.clients))
        log_gamma += np.log(rng.uniform(size=config.clients)) / config.beta
        shares = np.exp(log_gamma - log_gamma.max())
        cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.append(chunk)
    return [np.concatenate(part) for part in parts]


def _fill_empty(clients: list[np.ndarray]) -> None:
    for i, examples in enumerate(clients):
        if len(examples) == 0:
            donor = int(np.argmax([len(c) for c in clients]))
            clients[i], clients[donor] = clients[donor][-1:], clients[donor][:-1]


PARTITIONS = {"iid": iid, "dirichlet": dirichlet}
