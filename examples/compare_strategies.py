"""Trains the three strategies on scikit-learn's digits and prints the accuracy and costs of each.

    python examples/compare_strategies.py                                    # a few minutes on 2 CPU cores
    python examples/compare_strategies.py runtime.seed=1 federation.rounds=12

Arguments are config fields as FIELD=VALUE. Runs are stored in runs/compare/; an interrupted one continues.
"""

import ast
import sys

import lwfedssl_jax as lw

SMALL = {"model.depth": 2, "federation.rounds": 6, "federation.local_epochs": 2, "evaluation.labels_per_class": (5,)}
COLUMNS = {
    "strategy.name": "strategy",
    "accuracy.knn": "kNN accuracy",
    "untrained.knn": "untrained",
    "traffic_bytes": "traffic (bytes)",
    "flops_executed": "multiply-adds per sample",
}


def value(text):
    """A number, tuple or bool where the text is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(arguments):
    """Train the strategies, then read all runs back as one table."""
    fields = {name: value(text) for name, _, text in (argument.partition("=") for argument in arguments)}
    directories = []
    for strategy in ("layerwise", "progressive", "end_to_end"):
        config = lw.load_config("quickstart", {**SMALL, **fields, "strategy.name": strategy})
        run = lw.train(config, f"runs/compare/{strategy}-seed{config.runtime.seed}")
        directories.append(run.directory)
    results = lw.load_results(*directories)
    print(results[[*COLUMNS]].rename(columns=COLUMNS).to_string(index=False))


if __name__ == "__main__":
    main(sys.argv[1:])
