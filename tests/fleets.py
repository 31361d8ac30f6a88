"""Devices, and options with invented costs, for tests of the plan."""

from typing import Any

import numpy as np
from conftest import SMALL, known_traces, small_config

from lwfedssl_jax.config import Config, load, override, resolve
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs.ledger import make_ledger
from lwfedssl_jax.plan import make, recommend
from lwfedssl_jax.plan.clients import Clients
from lwfedssl_jax.plan.measured import Results
from lwfedssl_jax.plan.options import Option
from lwfedssl_jax.plan.published import closest

FLAGS = [
    word
    for name, value in SMALL.items()
    for word in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value]))
]


SMALL_PHONE = DeviceClass("phone", 3, 1.0, 1.0, 8.0, 8.0)


LARGE_BOX = DeviceClass("box", 1, 3.0, 10.0, 80.0, 80.0)


PAPER = resolve(load("paper/vit_tiny_mocov3"))


FLEET = "name,count,memory_gb,gflops,uplink_mbps,downlink_mbps,watts\nphone,3,{},0.5,1,1,2\nbox,1,1,5,10,10,30\n"


def equal_clients(*devices: DeviceClass, examples: float = 1) -> Clients:
    """One client for each device, all with as many images."""
    counts = [device.count for device in devices]
    number = sum(counts)
    return Clients(np.full(number, examples), np.repeat(np.arange(len(devices)), counts), np.ones(number), True)


def option(strategy: str, *peaks_gb: float, flops: float = 1e9, traffic: int = 1000, **of: Any) -> Option:
    """An option of one round a stage."""
    rows = [
        {"stage": s, "rounds": 1, "depth": s, "flops_executed": flops, "download_bytes": traffic,
         "upload_bytes": traffic, "frozen_bytes": 0, "peak_memory_bytes": gb * 1e9}
        for s, gb in enumerate(peaks_gb, 1)
    ]  # fmt: skip
    ledger: Any = {
        "per_stage": rows,
        "peak_memory_bytes": max(peaks_gb) * 1e9,
        "total_bytes": 2 * traffic * len(rows),
        "flops_executed": flops * len(rows),
    }
    layers, devices = of.get("layers", 1), [SMALL_PHONE, LARGE_BOX]
    fields = {"strategy.name": strategy, "strategy.layers_per_stage": layers, "runtime.remat": of.get("remat", False)}
    made = make.make_option(override(PAPER, fields), ledger, devices, equal_clients(*devices))
    published = closest(PAPER).accuracy(strategy, layers)
    return made._replace(measured=of.get("measured"), published=published)


def advise(*options: Option, protocol: str = "", **more: Any) -> recommend.Recommendation:
    devices = [SMALL_PHONE, LARGE_BOX]
    results = Results(protocol, shallow=more.pop("shallow", {}))
    return recommend.recommend(Config(), devices, options, results, closest(PAPER), dealt=True, **more)


def chosen(*options: Option, protocol: str = "", **more: Any) -> tuple[Option | None, str]:
    found = advise(*options, protocol=protocol, **more)
    return found.option, found.reason


def between_stages() -> float:
    """GB that suffice for the first two of progressive's three stages."""
    ledger = make_ledger(small_config(strategy__name="progressive"), known_traces())
    _, second, third = (row["trainable_parameters"] for row in ledger["per_stage"])
    return float(second + third) / 2e6
