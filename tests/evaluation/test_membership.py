"""Membership inference by the similarity of views."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from runs import train

from lwfedssl_jax.analysis import tables
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.evaluation import membership
from lwfedssl_jax.simulation import setup

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (400, 4, 4, 1), np.uint8)
MEMBERS, OTHERS = IMAGES[:200], IMAGES[200:]


def learnt_by_heart(images: np.ndarray) -> np.ndarray:
    """Features that are the same for both views of a member, which the tests make ``image`` and ``255 - image``."""
    known = {image.tobytes(): i for i, image in enumerate(MEMBERS)} | {
        (255 - image).tobytes(): i for i, image in enumerate(MEMBERS)
    }
    return np.stack(
        [
            np.random.default_rng(known.get(image.tobytes(), hash(image.tobytes()) % 2**32)).normal(size=32)
            for image in images
        ]
    )


def test_an_encoder_that_knows_images_by_heart_gives_them_away() -> None:
    found = membership.membership(learnt_by_heart, MEMBERS, OTHERS, RECIPES["digits"], 0)
    assert found["images"] == 200
    assert found["auc"] == found["tpr_at_1_percent_fpr"] == 1
    swapped = membership.membership(learnt_by_heart, OTHERS, MEMBERS, RECIPES["digits"], 0)
    assert (swapped["auc"], swapped["tpr_at_1_percent_fpr"]) == (0, 0)


def test_an_encoder_that_knows_nothing_is_at_chance() -> None:
    def features(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(float) - 127.5

    found = membership.membership(features, MEMBERS, OTHERS, RECIPES["digits"], 0)
    assert abs(found["auc"] - 0.5) < 3 * found["auc_error"]
    assert found["auc_error"] == pytest.approx(np.sqrt(1 / (6 * 200)), rel=0.1)  # at chance


def test_the_rate_is_at_one_percent_of_false_alarms() -> None:
    others = np.arange(1000.0)
    found = membership.compare(np.concatenate([np.full(300, 995.0), np.full(700, 0.0)]), others)
    assert found["tpr_at_1_percent_fpr"] == pytest.approx(0.3)
    assert membership.compare(others, others)["tpr_at_1_percent_fpr"] == pytest.approx(0.01, abs=2e-3)


def test_clients_that_share_images_have_no_members() -> None:
    with pytest.raises(
        ConfigError, match=r"^evaluation.membership: 10 images need owners, .*; accepted: 0, or another"
    ):
        small_config(evaluation__membership=10, partition__kind="shared", partition__examples_per_client=8)
    config = small_config(evaluation__membership=10)
    dataset = setup.prepare(config).dataset
    membership.check_membership(config, dataset)
    with pytest.raises(
        ConfigError, match=r"^evaluation.membership: 10 images are compared with test images, and there"
    ):
        membership.check_membership(config, dataset._replace(test_images=dataset.test_images[:0]))


def test_a_run_has_it_for_the_trained_and_the_untrained_encoder(tmp_path: Path) -> None:
    config = small_config(evaluation__membership=12, partition__server_share=0.5, model__depth=1)
    summary = train(config, tmp_path / "run")
    assert set(summary["membership"]) == {"trained", "untrained"}
    assert all(found["images"] == 12 for found in summary["membership"].values())
    run = setup.prepare(config)
    members, others = membership.members_and_others(config, run.dataset, run.clients)
    owned = {run.dataset.train_images[i].tobytes() for client in run.clients for i in client}
    assert {image.tobytes() for image in members} <= owned
    assert len(members) == len(others) == 12
    table = tables.membership_table({"a": summary, "b": {}})
    assert table is not None
    assert list(table.words["encoder"]) == ["trained", "untrained"]
    assert tables.membership_table({"b": {}}) is None
