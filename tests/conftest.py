"""What all tests share: strict numerics (no silent promotion of types or ranks), cheap endings of runs, fixtures."""

import copy
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The tests' processes share the cores; NumPy's threads, which are made when it is imported, would wait for each other.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lwfedssl_jax.config import Config, override, resolve
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.costs.operations import Known
from lwfedssl_jax.data.views import Recipe
from lwfedssl_jax.evaluation import frozen, label_free
from lwfedssl_jax.experiment import finish, ledgers
from lwfedssl_jax.method import fedca, pretext
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.method.stages import STRATEGIES, Stage
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.plan import make
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.simulation.state import RoundState

pytest.register_assert_rewrite("fleets", "images", "rounds", "runs")
import reference  # noqa: E402
from images import picture  # noqa: E402

ROOT = Path(__file__).parent.parent
MOST_MAPS = 20_000

# Four devices; and less time on compiling code that runs for a moment only. XLA knows the last flag below jax 0.11.
FLAGS = ["--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ |= {"XLA_FLAGS": " ".join(FLAGS), "JAX_PLATFORMS": "cpu"}  # also of the processes that tests start
jax.config.update("jax_platforms", "cpu")
gc.freeze()  # JAX's modules are not searched for garbage while it traces


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests share what they compile, within a session, or over sessions in the folder $TESTS_CACHE (`.ci/run`)."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla"  # one for all workers
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("TESTS_CACHE", str(folder))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Forget compiled programs when there are many: each takes memory maps, of which Linux gives a process 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def strict_numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of ours runs under strict promotion; optax's bias correction is not written for it."""

    def lenient(optimizer: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
            def update(*args: Any) -> Any:
                with jax.numpy_dtype_promotion("standard"):
                    return inner.update(*args)

            inner = optimizer(*args, **kwargs)
            return optax.GradientTransformation(inner.init, update)

        return make

    for name in ("adam", "adamw"):
        monkeypatch.setattr(optax, name, lenient(getattr(optax, name)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def plain_views(images_NxHxWxC: np.ndarray, *_: object) -> np.ndarray:
    """As ``label_free.views_of``, which is dear to compile."""
    return np.stack([images_NxHxWxC, 255 - images_NxHxWxC])


REAL_VIEWS_OF = label_free.views_of
label_free.views_of = plain_views  # also for fixtures of modules
TRACES = setup.Cache()


@pytest.fixture(autouse=True)
def cheap_endings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that ends a run costs seconds, and ledgers minutes: those at the end are without peak memory, and all
    share what they trace. Runs of a module's fixtures, made before this one, and those of processes have all of it.
    """

    def price(config: Config, *_: object) -> dict[str, ledger.Ledger]:
        return ledger.all_strategies(config, memory=False, known=known_traces())

    monkeypatch.setattr(finish, "write_report", lambda directories, out: None)
    monkeypatch.setattr(finish, "ledgers_of_run", price)
    for module in (finish, ledgers):
        monkeypatch.setattr(module, "known_traces", lambda cache: known_traces())


def known_traces() -> Known:
    """What ledgers of this process have traced, for those that may share it."""
    entries = tuple(id(entry) for table in (STRATEGIES, OBJECTIVES, TERMS) for entry in table.values())
    return TRACES.get((pretext.two_views, entries), dict)


SMALL: dict[str, Any] = {
    "data.name": "synthetic",
    "data.image_size": 8,
    "data.synthetic_examples": 60,
    "data.synthetic_classes": 3,
    "partition.clients": 4,
    "partition.kind": "dirichlet",
    "model.name": "vit_micro",
    "model.patch_size": 4,
    "model.width": 8,
    "model.depth": 3,
    "model.heads": 2,
    "objective.name": "simclr",  # the least to compile
    "objective.hidden_dim": 12,
    "objective.output_dim": 6,
    "objective.temperature": 0.2,
    "federation.rounds": 3,
    "federation.local_epochs": 2,
    "optimizer.batch_size": 8,
    "optimizer.learning_rate": 0.1,
    "evaluation.labels_per_class": (5,),
    "evaluation.neighbours": 5,
}


def small_config(**changes: Any) -> Config:
    """A config that compiles in a second or two; keywords are ``section__field``."""
    return resolve(override(Config(), SMALL | {k.replace("__", "."): v for k, v in changes.items()}))


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the functions XLA has compiled since the test began."""
    names: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def encoding(run: setup.Prepared) -> frozen.Encode:
    """``images -> features`` of a run's encoder."""
    return frozen.make_encode(run.task.encoder, run.task.recipe, run.task.dtype)


def run_round(
    simulator: Simulator, stage: Stage, params: Any, state: RoundState | None, number: int
) -> tuple[Any, RoundState, dict[str, Any]]:
    """One round of a simulator's only run: parameters, state and the round's line.

    Raises:
      FloatingPointError: no client's update is finite.
    """
    result = simulator.run_rounds(stage, params, state, number)
    (outcome,) = result.outcomes
    if outcome.error:
        raise outcome.error
    return result.params, result.state, outcome.line


def noisy_views(key: jax.Array, images_BxHxWxC: jax.Array, recipe: Recipe, dtype: Any = jnp.float32) -> jax.Array:
    """Like ``two_views``, with noise in place of augmentations, which are dear to compile: ``view_2xBxHxWxC``."""
    wide = np.promote_types(dtype, np.float32)
    plain = (images_BxHxWxC.astype(wide) / 255 - recipe.mean) / recipe.std

    def sample(i: jax.Array, image: jax.Array) -> jax.Array:
        return image[None] + jax.random.normal(jax.random.fold_in(key, i), (2, *image.shape), wide) / 2

    return jax.vmap(sample, out_axes=1)(jnp.arange(len(plain)), plain).astype(dtype)


@pytest.fixture
def cheap_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds, here and in the reference, with ``noisy_views``: the real ones are tested by themselves, and in runs."""
    for module in (pretext, fedca, reference):
        monkeypatch.setattr(module, "two_views", noisy_views)


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of data sets of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache" / "lwfedssl_jax" / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``train/{cat,dog}`` with 3 images each, ``test/{cat,dog}`` with 2, of several sizes, formats and modes."""
    root = tmp_path / "pets"
    for split, n in (("train", 3), ("test", 2)):
        for label, first in (("dog", 100), ("cat", 200)):
            for i, (suffix, mode) in enumerate([("png", "L"), ("PNG", "RGBA"), ("bmp", "RGB")][:n]):
                picture(root / split / label / "inner" / f"{i}.{suffix}", first + i, (4 + i, 7), mode)
    return root


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step needs a thousand bytes a trainable parameter; nothing is compiled for it."""
    made: dict[Any, Any] = {}

    def make_known(config: Config) -> Any:
        key = override(ledger_config(config), {"partition.clients": 1})
        if key not in made:
            made[key] = ledger.make_ledger(config, known_traces())
        return copy.deepcopy(made[key])

    def cheap(configs: dict[Any, Config], *, memory: bool, **_: Any) -> dict[Any, Any]:
        ledgers = {name: make_known(config) for name, config in configs.items()}
        for costs in ledgers.values():
            for row in costs["per_stage"]:
                row["peak_memory_bytes"] = 1000 * row["trainable_parameters"]
            costs["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in costs["per_stage"])
        return ledgers

    monkeypatch.setattr(make, "ledgers_of", cheap)
    monkeypatch.setattr(ledger, "ledgers_of", cheap)


EXHAUSTIVE = ROOT / "tests" / "exhaustive.txt"


# Processes take the files one by one: those that take long come first, so that all end at about the same time.
LONG = [
    "test_pilot_server.py",
    "test_gpu_benchmark.py",
    "test_rounds.py",
    "test_train.py",
    "test_fedca.py",
    "test_additions.py",
    "test_shards.py",
    "test_devices.py",
    "test_sweep.py",
    "test_examples.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``exhaustive.txt`` names; a line that names none of a collected file is an error."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    names = [line for line in EXHAUSTIVE.read_text().splitlines() if line and not line.startswith("#")]
    for name in names:
        file, _, beginning = name.partition("::")
        of_file = [item for item in items if item.path.name == file]
        chosen = [item for item in of_file if item.name.startswith(beginning)]
        for item in chosen:
            item.add_marker("exhaustive")
        whole_file = len({item.name.partition("[")[0] for item in of_file}) > 1
        if (whole_file and not chosen) or not any(EXHAUSTIVE.parent.rglob(file)):
            raise pytest.UsageError(f"{EXHAUSTIVE.name}: no test is called {name}")
