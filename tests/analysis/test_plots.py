"""Plots: what is drawn, not how it looks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import known_traces, small_config

from lwfedssl_jax.analysis import run_plots, style
from lwfedssl_jax.config import PartitionConfig
from lwfedssl_jax.costs.ledger import all_strategies
from lwfedssl_jax.data.partition import partition

MIB = 2**20


def test_images_without_a_label_are_of_no_class() -> None:
    counts = run_plots._class_counts(np.array([-1, 0, 2, 2, -1]), [np.array([0, 1, 2]), np.array([3, 4])])
    assert counts.tolist() == [[1, 0, 1], [0, 0, 1]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, last first."""
    saved: list[Any] = []
    save = style.save_figure

    def keep(figure: Any, path: Path) -> None:
        saved.insert(0, figure)
        save(figure, path)
        assert path.stat().st_size > 5000

    monkeypatch.setattr(style, "save_figure", keep)
    return saved


def round_line(number: int, stage: int, distance: float | None = 0.5, mib: float = 1.0) -> dict[str, Any]:
    sent = int(mib * MIB)
    return {
        "round": number, "stage": stage, "loss": 1.0, "client_distance": distance, "clients": 3, "dropped": 1,
        "download_bytes": 4 * sent, "upload_bytes": 3 * sent,
    }  # fmt: skip


def evaluation(number: int, accuracy: float, protocol: str = "knn") -> dict[str, Any]:
    return {"event": "evaluation", "round": number, "protocol": protocol, "accuracy": accuracy}


@pytest.mark.parametrize("memory", [True, False])
def test_resources_end_at_the_ledgers_totals(memory: bool, figures: list[Any], tmp_path: Path) -> None:
    strategies = all_strategies(
        small_config(federation__rounds=7, federation__local_epochs=2), memory=False, known=known_traces()
    )
    if memory:
        for ledger in strategies.values():
            for stage in ledger["per_stage"]:
                stage["peak_memory_bytes"] = stage["stage"] * MIB
            ledger["peak_memory_bytes"] = len(ledger["per_stage"]) * MIB
    run_plots.plot_resources(strategies, 2, tmp_path / "resources.png")
    axes = np.array(figures[0].axes).reshape(2, 2 + memory)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [*strategies, "by the paper's rule", "E = 2 of this config"]

    def lines(panel: Any) -> list[Any]:
        return [line.get_xydata() for line in panel.lines[: 2 * len(strategies)]]

    for i, ledger in enumerate(strategies.values()):
        executed, rule = lines(axes[0, -2])[2 * i : 2 * i + 2]
        assert len(executed) == 8
        assert executed[0].tolist() == [0, 0]
        assert executed[-1] == pytest.approx([7, ledger["flops_executed"] / 1e9])
        assert rule[-1] == pytest.approx([7, ledger["flops_paper_rule"] / 1e9])
        assert lines(axes[0, -1])[i][-1] == pytest.approx([7, ledger["total_bytes"] / MIB])
        of_e = lines(axes[1, -2])[2 * i]
        assert of_e[:, 0].tolist() == list(range(1, 11))
        assert of_e[1, 1] == pytest.approx(ledger["flops_executed"] / 1e9)
        assert of_e[9, 1] == pytest.approx(5 * ledger["flops_executed"] / 1e9)
        assert lines(axes[1, -1])[i][:, 1] == pytest.approx(ledger["total_bytes"] / MIB)
    if memory:
        assert lines(axes[0, 0])[1].tolist() == [[1, 1], [2, 1], [3, 1], [4, 2], [5, 2], [6, 3], [7, 3]]
        assert set(lines(axes[1, 0])[1][:, 1]) == {3}


def test_distance_leaves_out_rounds_without_any(figures: list[Any], tmp_path: Path) -> None:
    lines = [round_line(1, 1), evaluation(1, 0.5), round_line(2, 1, None), round_line(3, 2, 0.25)]
    run_plots.plot_distance(lines, tmp_path / "distance.png")
    (axes,) = figures[0].axes
    drawn, boundary = axes.lines
    assert drawn.get_xydata().tolist() == [[1, 0.5], [3, 0.25]]
    assert set(boundary.get_xdata()) == {2.5}


def test_partitions_show_shares_on_one_scale(figures: list[Any], tmp_path: Path) -> None:
    labels = np.arange(200) % 4
    skewed = PartitionConfig(kind="dirichlet", beta=0.01, clients=8, allow_empty=True)
    populations = {"skewed": partition(skewed, labels, 1), "iid": partition(PartitionConfig(clients=5), labels, 0)}
    run_plots.plot_partitions(labels, populations, tmp_path / "partitions.png")
    sizes, below = figures[0].axes[:2], figures[0].axes[2:4]
    for (title, population), top, panel in zip(populations.items(), sizes, below, strict=True):
        assert top.get_title() == title
        assert [bar.get_height() for bar in top.patches] == population.sizes.tolist()
        shares = np.asarray(panel.images[0].get_array())
        assert shares.shape == (4, len(population))
        assert shares.sum(0) == pytest.approx(np.where(population.sizes, 100, 0))
        assert panel.images[0].get_clim() == below[0].images[0].get_clim()
    assert 0 in populations["skewed"].sizes


def test_accuracy_is_averaged_over_seeds_at_the_traffic_of_a_client() -> None:
    seeds = [
        [evaluation(0, 0.1), round_line(1, 1), round_line(2, 1), evaluation(2, accuracy), evaluation(2, 0.0, "other")]
        for accuracy in (0.5, 0.7)
    ]
    single = [[evaluation(0, 0.1), round_line(1, 1, mib=2), evaluation(1, 0.3)]]
    runs = {"several": seeds, "one": single}
    (axes,) = run_plots.accuracy_against_traffic(runs, "knn").axes
    several, one = axes.lines
    assert several.get_xydata() == pytest.approx(np.array([[0, 10], [2 * 7 / 4, 60]]))
    assert one.get_xydata() == pytest.approx(np.array([[0, 10], [2 * 7 / 4, 30]]))
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((10, 60 + 10 * np.sqrt(2)))
    with pytest.raises(ValueError, match="the runs of 'several' share no round that 'kNN' has evaluated"):
        run_plots.accuracy_against_traffic(runs, "kNN")


def test_classes_and_clients_have_their_names_where_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(run_plots.style, "save_figure", lambda figure, path: drawn.append(figure.axes[0]))
    labels, clients = np.array([0, 1, 1, 0]), [np.array([0, 1]), np.array([2, 3])]
    run_plots.plot_clients(labels, clients, tmp_path, ("cat", "a dog with a very long name"), ("ann", "bob"))
    assert [tick.get_text() for tick in drawn[0].get_yticklabels()] == ["cat", "a dog with a very l…"]
    assert [tick.get_text() for tick in drawn[0].get_xticklabels()] == ["ann", "bob"]
    run_plots.plot_clients(labels, clients * 20, tmp_path, (), tuple("ab" * 20))
    assert "a" not in [tick.get_text() for tick in drawn[1].get_xticklabels()]
