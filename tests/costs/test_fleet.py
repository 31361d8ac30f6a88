"""Device classes: how they are read, and what they can afford, by hand."""

from pathlib import Path

import numpy as np
import pytest

from lwfedssl_jax.config import Config, ConfigError, override, resolve, to_dict
from lwfedssl_jax.config.device_classes import DeviceClass, describe, load_classes, read_csv
from lwfedssl_jax.costs import fleet

PHONE = DeviceClass("old phone", 30, 2.0, 50.0, 10.0, 40.0, 3.5)
BOX = DeviceClass("box", 10, 16.0)
CSV = "name,count,memory_gb,gflops,uplink_mbps,downlink_mbps,watts\nold phone,30,2,50,10,40,3.5\nbox,10,16,,,,\n"
# Two stages: 10 rounds of 4e9 multiply-adds and 5 MB each way for a sample, then 5 of 8e9 and 10 MB.
PER_STAGE = [
    {"stage": 1, "rounds": 10, "flops_executed": 40e9, "download_bytes": 50e6, "upload_bytes": 50e6,
     "frozen_bytes": 0, "peak_memory_bytes": 2_000_000_000},
    {"stage": 2, "rounds": 5, "flops_executed": 40e9, "download_bytes": 50e6, "upload_bytes": 50e6,
     "frozen_bytes": 20_000_000, "peak_memory_bytes": 2_000_000_001},
]  # fmt: skip


def test_csv_and_descriptions_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "fleet.csv").write_text("\ufeff" + CSV)
    assert read_csv(tmp_path / "fleet.csv") == [PHONE, BOX]
    described = [describe(device) for device in (PHONE, BOX)]
    assert described[0] == "old phone count=30 memory_gb=2 gflops=50 uplink_mbps=10 downlink_mbps=40 watts=3.5"
    assert load_classes(described) == load_classes([str(tmp_path / "fleet.csv")]) == [PHONE, BOX]


def test_resolving_puts_the_classes_in_the_place_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text(CSV)
    config = resolve(override(Config(), {"fleet.devices": (str(file),)}))
    file.unlink()
    assert config.fleet.devices == (describe(PHONE), describe(BOX))
    assert resolve(config) == config
    assert to_dict(config)["fleet"]["devices"] == list(config.fleet.devices)


BAD_FILES = {
    "": "lacks the column name; accepted: name, count",
    "name,count,memory_gb\n": "has columns but no device class; accepted: a line per class",
    "name,count\na,1\n": "lacks the column memory_gb; accepted: ",
    "name,count,memory_gb,ram\na,1,2,3\n": "unknown or repeated column 'ram'; accepted: name, count",
    "name;count;memory_gb\na;1;2\n": "separates columns by ';'; accepted: commas",
    "name,count,count,memory_gb\na,1,1,2\n": "unknown or repeated column 'count'",
    "name,count,memory_gb\na,1\n": "line 2 has 2 cells; accepted: 3",
    "name,count,memory_gb\na,0,2\n": "count '0' of ",
    "name,count,memory_gb\na,1.5,2\n": "count '1.5' of ",
    "name,count,memory_gb\na,,2\n": "line 2 does not have count",
    "name,count,memory_gb\na,1,x\n": "memory_gb 'x' of ",
    "name,count,memory_gb\na,1,nan\n": "memory_gb 'nan' of ",
    "name,count,memory_gb,gflops\na,1,2,-5\n": "line 2 is out of range; accepted: a number from 1e-06 to 1e+12",
    "name,count,memory_gb\n,1,2\n": "name '' of ",
    "name,count,memory_gb\na=b,1,2\n": "name 'a=b' of ",
    "name,count,memory_gb\na,1,2\na,2,3\n": "two classes are called 'a'; accepted: ",
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.items())
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"^fleet\.devices: .*; accepted: ") as refused:
        resolve(override(Config(), {"fleet.devices": (str(tmp_path / "fleet.csv"),)}))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\0", "a folder"])
def test_unreadable_files(content: bytes | str | None, tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    with pytest.raises(ValueError, match=r"cannot be read .*; accepted: a CSV file"):
        read_csv(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phone", "'phone' does not have count"),
        ("phone count=1", "does not have memory_gb"),
        ("count=1 memory_gb=2", "name '' of "),
        ("phone count=1 memory_gb=2 ram=3", "'ram' of .* is unknown"),
        ("phone count=1 memory_gb=2 memory_gb=3", "'memory_gb' of .* is unknown, repeated"),
        ("phone count=1 memory_gb=", "'memory_gb' of .* without a value"),
        ("phone count=1 memory_gb=2 x", "'x' of "),
        ("phone count=1 memory_gb=1e999", "memory_gb '1e999' of .* is out of range"),
        ("phone count=9999999999 memory_gb=1", "count '9999999999' of .* is not valid"),
    ],
)
def test_bad_descriptions(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*; accepted: "):
        load_classes([text])


@pytest.mark.parametrize("devices", [(), (describe(PHONE), describe(BOX))])
def test_a_deadline_needs_speeds(devices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^fleet.deadline_seconds: 5.0 needs classes .*; accepted: 0.0, or"):
        resolve(override(Config(), {"fleet.devices": devices, "fleet.deadline_seconds": 5.0}))


def test_what_a_class_does_by_hand() -> None:
    """100 samples of 8 GFLOP at 50 GFLOP/s are 16 s; 5 MB take 4 s at 10 Mbit/s, 1 s at 40."""
    one = np.array([100])
    part = fleet.participation(PHONE, PER_STAGE, one, deadline=0)
    assert part.stages == [1]
    assert part.round_seconds == pytest.approx([16 + 4 + 1, 32 + 8 + 2])
    assert part.seconds == pytest.approx(210)
    assert part.traffic_bytes == 100e6
    assert part.energy_wh == pytest.approx(3.5 * 210 / 3600)
    assert fleet.participation(BOX, PER_STAGE, one, deadline=0) == fleet.Participation(
        [1, 2], [1, 1], 1, None, None, None, 220_000_000, None
    )
    assert fleet.participation(PHONE, PER_STAGE, one, deadline=21).stages == [1]
    assert fleet.participation(PHONE, PER_STAGE, one, deadline=20.9).stages == []


def test_the_slowest_client_that_can_take_part_sets_the_time_and_frozen_layers_are_fetched_once() -> None:
    large = PHONE.__class__("large", 3, 16.0, 50.0, 10.0, 40.0, 3.5)
    sizes = np.array([100, 50, 1000])
    part = fleet.participation(large, PER_STAGE, sizes, deadline=30)
    assert part.stages == [1, 2]
    assert part.shares == pytest.approx([2 / 3, 1 / 3])  # 100 images take 42 s in stage 2, 50 images 26 s
    assert part.everywhere == pytest.approx(1 / 3)
    assert part.round_seconds == pytest.approx([21, 26])
    assert part.fetch_seconds == pytest.approx(4)
    assert part.seconds == pytest.approx(10 * 21 + 5 * 26 + 4)
    assert part.traffic_bytes == 220e6
    only_second = fleet.participation(large, PER_STAGE[1:], sizes, deadline=0)  # it joins late, and fetches all
    assert only_second.seconds == pytest.approx(5 * (320 + 10) + 4)
    assert fleet.fetched_bytes([]) == 0


def test_clients_are_dealt_in_proportion_and_by_the_seed() -> None:
    dealt = fleet.deal([PHONE, BOX], 10, seed=0)
    assert np.bincount(dealt).tolist() == [8, 2]  # 7.5 and 2.5: the first takes the remainder
    assert (dealt == fleet.deal([PHONE, BOX], 10, seed=0)).all()
    assert any((dealt != fleet.deal([PHONE, BOX], 10, seed=n)).any() for n in range(1, 4))
    assert np.bincount(fleet.deal([PHONE, BOX], 1, seed=0), minlength=2).tolist() == [1, 0]


def test_clients_that_can_take_part_and_what_the_summary_says_of_them() -> None:
    fast = DeviceClass("fast", 30, 4.0, 500.0, 10.0, 40.0)
    examples = np.array([100, 1000, 100, 1000])
    made = fleet.make_fleet([PHONE, fast], PER_STAGE, examples, 30.0, seed=0)
    phones = made.classes == 0
    assert phones.sum() == 2
    assert (made.can[1] == (~phones | (examples == 100))).all()  # 100 samples: 21 s; 1000: 165 s
    assert (made.can[2] == (~phones & (examples < 1000))).all()  # of the fast ones 13.2 s, 42 s
    for number, told in enumerate(fleet.summary(made, examples)):
        mine = made.classes == number
        assert told["clients"] == 2
        assert told["clients_by_stage"] == [(made.can[s] & mine).sum() for s in (1, 2)]
        assert told["stages"] == [s for s in (1, 2) if (made.can[s] & mine).any()]
        slowest = [21.0, None] if number == 0 else [5 + 16 * (examples[mine].max() / 1000), None]
        if told["clients_by_stage"][0]:
            assert told["round_seconds_by_stage"][0] == pytest.approx(slowest[0])
