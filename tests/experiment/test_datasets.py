"""The data that a run was begun on."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from runs import Interrupting, train

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.simulation import events, setup


@pytest.mark.usefixtures("cheap_views", "cache_home")
def test_changed_data_and_random_streams_are_refused_on_a_run_that_was_begun(tmp_path: Path) -> None:
    def write(images: int) -> None:
        rng = np.random.default_rng(images)
        parts = {
            f"{split}_{name}": rng.integers(0, high, (count, *shape)).astype(np.uint8)
            for split, count in (("train", images), ("test", 12))
            for name, high, shape in (("images", 256, (8, 8, 3)), ("labels", 3, (1,)))
        }
        np.savez(tmp_path / "mine.npz", **parts)

    config = small_config(data__name=f"npz:{tmp_path / 'mine.npz'}", partition__kind="iid", evaluation__neighbours=3,
                          evaluation__labels_per_class=())  # fmt: skip
    path, cache = tmp_path / "run", setup.Cache()
    refused = r"begun on other data: data.name 'npz:.*' had images \w+ labels \w+ there and has images \w+ labels"
    write(48)
    with pytest.raises(KeyboardInterrupt):
        train(config, path, Interrupting(1), cache)
    written = (path / "config.json").read_bytes()
    about = json.loads(written)
    (path / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k != "random_streams"}))
    with pytest.raises(ConfigError, match="unfinished run of a version with random streams 1, and this version has 2"):
        train(config, path, cache=cache)
    (path / "config.json").write_bytes(written)
    write(60)
    with pytest.raises(ConfigError, match=refused):
        train(config, path)
    assert (path / "config.json").read_bytes() == written
    write(48)
    summary = train(config, path, cache=cache)
    assert train(config, path) == summary
    write(60)
    with pytest.raises(ConfigError, match=refused):
        train(config, path)
    (tmp_path / "mine.npz").unlink()
    heard: list[events.Event] = []
    assert train(config, path, heard.append) == summary
    (note,) = [event.text for event in heard if isinstance(event, events.Note)]
    assert "cannot be compared" in note
