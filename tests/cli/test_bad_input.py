"""Whatever bad input a user makes: exit code 2, one line that says what is wrong, nothing compiled, nothing written."""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import os
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import jax
import pytest
from conftest import SMALL, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwfedssl_jax import cli
from lwfedssl_jax.config import MODELS, Config, available, to_dict
from lwfedssl_jax.data.partition import PARTITIONS
from lwfedssl_jax.data.sources import SOURCES
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.stateful_clients import STARTS

EXAMPLES = os.environ.get("HYPOTHESIS_EXAMPLES")  # so many, and others in each run; see CONTRIBUTING.md


class Bad(NamedTuple):
    """A command line, the file ``mine.py`` that it may name, and what the one line must hold."""

    arguments: list[str]
    says: tuple[str, ...]
    file: str | bytes = ""


HINTS = {s.name: typing.get_type_hints(s.default_factory, include_extras=True) for s in dataclasses.fields(Config)}
FIELDS = {f"{section}.{name}": hint for section, hints in HINTS.items() for name, hint in hints.items()}
NAMES = {
    *MODELS,
    *SOURCES,
    *RECIPES,
    *PARTITIONS,
    *OBJECTIVES,
    *STRATEGIES,
    *AGGREGATORS,
    *STARTS,
    "auto",
    "True",
    "False",
    "-h",
    "--help",
}
NAMES |= {name for hint in FIELDS.values() if get_origin(hint) is Literal for name in get_args(hint)}

COMMANDS = st.sampled_from(["train", "resources"])
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXT = st.text(LETTERS, max_size=12).filter(lambda text: text not in NAMES)
# No option, no name of anything, no data set.
WORDS = TEXT.filter(lambda text: text[:1] != "-" and text[:5] != "tfds:") | st.sampled_from(["layer", "IID", "True "])
CODE = st.sampled_from(
    ["None", "[]", "{}", "b'5'", "object()", "np.ones(3)", "np.float32(1)", "2j", "Config", "{1: 2}"]
)
NO_NUMBERS = ["nan", "inf", "-inf"]
JUNK: dict[type, list[str]] = {
    int: [*NO_NUMBERS, "2.0", "True"],
    float: [*NO_NUMBERS, "10**400", "True"],
    bool: ["0", "1.0"],
    str: ["3", "'tfds:'", "'digits:'"],
}
IMPORTS = "import numpy as np\nfrom math import inf, nan\nfrom lwfedssl_jax.config import Config, load, override\n"


def outside(kind: type, interval: Any) -> st.SearchStrategy[str]:
    """Numbers that an interval does not hold."""
    numbers: Any = st.integers if kind is int else functools.partial(st.floats, allow_nan=False, allow_infinity=False)
    below, above = numbers(None, math.ceil(interval.low)), interval.high
    some = below if math.isinf(above) else below | numbers(math.floor(above), None)
    return some.filter(lambda x: x not in interval).map(repr)


def matches_nothing(text: str) -> bool:
    """Whether no config has it in its name; an empty text does."""
    return not text or not any(text in name or fnmatch.fnmatch(name, text) for name, _ in available())


def no_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return True
    return False


def no_value(hint: Any, in_shell: bool) -> st.SearchStrategy[str]:
    """What a field of that type does not take: words of a shell, or Python code."""
    if get_origin(hint) is Annotated:
        kind, interval = get_args(hint)
        return outside(kind, interval) | no_value(kind, in_shell)
    if get_origin(hint) is tuple:
        item = no_value(get_args(hint)[0], in_shell)
        return item if in_shell else CODE | item.map(lambda code: f"({code},)")
    words = WORDS.filter(no_number)
    if in_shell:
        return words | st.sampled_from([*NO_NUMBERS, "1e999", "2,5"])
    return words.filter(bool).map(repr) | CODE | st.sampled_from(JUNK.get(hint, JUNK[str]))


@st.composite
def bad_fields(draw: st.DrawFn) -> Bad:
    """One field of a wrong type, not finite, out of range or choices, in a file or on the command line."""
    command, field, in_shell = draw(COMMANDS), draw(st.sampled_from(sorted(FIELDS))), draw(st.booleans())
    value = draw(no_value(FIELDS[field], in_shell))
    if not in_shell:
        return Bad(
            [command, "mine.py"], (field,), f"{IMPORTS}config = override(load('good.py'), {{{field!r}: {value}}})"
        )
    words = draw(st.sampled_from([[f"--{field}", value], [f"--{field}={value}"]]))
    quoted = value if value.isascii() and (value.isalpha() or value.lstrip("-").isdigit()) else ""
    return Bad([command, "good.py", *(word.replace("_", "-") for word in words[:1]), *words[1:]], (field, quoted))


SOME = st.integers(1, 1000)
SHARE = st.floats(0.01, 1)
NO_DIVISORS = st.sampled_from([3, 5, 9, 16])
STAGED = st.sampled_from(["layerwise", "progressive"])
KEEPING = st.sampled_from([name for name, start in STARTS.items() if start])
END_TO_END: dict[str, Any] = {"strategy.name": "end_to_end"}
RESNET: dict[str, Any] = {"model.name": "resnet18", "model.patch_size": 0, "model.heads": 0}
BASE: dict[str, Any] = END_TO_END | {"additions.terms": ("base=1",)}
# Changes to conftest's SMALL that do not go together; the line names the first.
COMBINATIONS: list[dict[str, Any]] = [
    {"model.patch_size": NO_DIVISORS},
    {"model.heads": NO_DIVISORS},
    {"model.patch_size": 4, "model.name": "resnet18"},
    {"model.heads": 2, "model.name": "resnet18", "model.patch_size": 0},
    {"model.depth": SOME.map(lambda n: 4 + n)} | RESNET,
    {"model.stem": st.sampled_from(["imagenet", "small"])},
    {"data.synthetic_examples": st.integers(1, 9), "data.synthetic_classes": st.integers(10, 99)},
    {"strategy.layers_per_stage": SOME.map(lambda n: 3 + n)},
    {"federation.rounds": st.integers(1, 2), "strategy.name": STAGED},
    {"federation.rounds": SOME, "model.depth": SOME.map(lambda n: 1000 + n), "strategy.name": STAGED},
    {"federation.clients_per_round": SOME.map(lambda n: 4 + n)},
    {"federation.client_start": KEEPING, "strategy.name": STAGED},
    {"federation.client_start": KEEPING, "objective.name": "simclr"} | END_TO_END,
    {"evaluation.labels_per_class": (), "evaluation.neighbours": 0},
    {"evaluation.fine_tune_warmup_epochs": SOME, "evaluation.fine_tune_epochs": 1},
    {"additions.calibration_steps": SOME},
    {"additions.depth_dropout": SHARE} | END_TO_END,
    {"additions.depth_dropout": SHARE, "strategy.layers_per_stage": 3},
    {"additions.depth_dropout": SHARE} | RESNET,
    {"additions.terms": st.sampled_from([("proximal",), ("l1=1",), ("base=-1",), ("base=nan",), ("base=1",) * 2])},
    {"additions.dictionary": st.integers(1, 8), "objective.name": "byol"},
    {"additions.base_steps": SOME},
    {"additions.terms": ("base=1",), "additions.base_steps": SOME, "partition.server_share": 0.5},
    {"additions.base_steps": 0, "partition.server_share": 0.5} | BASE,
    {"partition.server_share": 0.0, "additions.base_steps": SOME} | BASE,
]
# The same, but only the data tells.
WITH_DATA: list[dict[str, Any]] = [
    {"partition.clients": SOME.map(lambda n: 60 + n)},
    {"partition.clients": SOME.map(lambda n: 30 + n), "partition.server_share": 0.5},
    {"partition.server_share": st.sampled_from([1e-9, 0.02, 0.999, 1.0])},
    {"partition.examples_per_client": SOME.map(lambda n: 60 + n), "partition.kind": "shared"},
    {"evaluation.labels_per_class": SOME.map(lambda n: (5, 20 + n))},
    {"evaluation.neighbours": SOME.map(lambda n: 60 + n)},
    {"data.name": st.sampled_from(["tfds:nothing", "tfds:../x", "tfds:no/such:1.0.0", "tfds:a\nb"])},
]


@st.composite
def bad_combinations(draw: st.DrawFn) -> Bad:
    """Fields that are right one by one, in a file or on the command line."""
    command = draw(COMMANDS)
    table = draw(st.sampled_from(COMBINATIONS + (WITH_DATA if command == "train" else [])))
    changes = {name: draw(x) if isinstance(x, st.SearchStrategy) else x for name, x in table.items()}
    says = (next(iter(changes)).removesuffix(".labels_per_class"),)
    if draw(st.booleans()):
        return Bad([command, "mine.py"], says, f"{IMPORTS}config = override(load('good.py'), {changes!r})")
    words: list[str] = []
    for name, value in changes.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value])]
    return Bad([command, "good.py", *words], says)


def misspelt(words: list[str]) -> st.SearchStrategy[str]:
    """One of the words with a letter dropped, doubled or put in, which makes it none of them."""

    def spoil(word: str, at: int, letter: str, how: int) -> str:
        at %= len(word)
        return word[:at] + ["", 2 * word[at], letter + word[at]][how] + word[at + 1 :]

    known = {*words, "", "--help", "-h"}
    spoilt = st.builds(spoil, st.sampled_from(words), st.integers(2, 99), st.sampled_from("xZ1-.="), st.integers(0, 2))
    return spoilt.filter(lambda word: word.split("=")[0] not in known)


FIELD_OPTIONS = ["--" + name.replace("_", "-") for name, hint in FIELDS.items() if get_origin(hint) is not tuple]
TRAIN_OPTIONS = ["--workdir", "--coordinator", "--processes", "--process"]
RESOURCES_OPTIONS = ["--plot", "--json", "--no-json", "--memory", "--no-memory"]
OPTIONS = [*FIELD_OPTIONS, *TRAIN_OPTIONS, *RESOURCES_OPTIONS, "--compilation-cache"]


@st.composite
def bad_options(draw: st.DrawFn) -> Bad:
    """Options that do not exist, lack a value or have one too many."""
    command, word, one = draw(COMMANDS), draw(WORDS), draw(st.sampled_from(FIELD_OPTIONS))
    unknown = draw(misspelt(OPTIONS) | st.sampled_from(RESOURCES_OPTIONS if command == "train" else TRAIN_OPTIONS))
    bad = [[unknown], [unknown, word], [word], [one], [one, "--runtime.x", "1"], [one, "1", word]]
    return Bad([command, draw(st.sampled_from(["good.py", "quickstart"])), *draw(st.sampled_from(bad))], ())


NO_CONFIGS: list[str | bytes] = [
    "", "config = (", "1 / 0", "config = 3", "config = Config", "import no_such_module", "raise SystemExit(0)",
    "raise ValueError('two\\nlines')", "class Own(BaseException): pass\nraise Own", "config = load('none')",
    "config = Config(rounds=3)", "config = override(Config(), {'federation.round': 3})", b"\xff\xfe", b"\0",
]  # fmt: skip
PATHS = ["no.py", "notes", "notes/no.py", "file/x.py", ".py", "folder.py", "/", "..", "x" * 300, "x" * 300 + ".py"]


@st.composite
def bad_commands(draw: st.DrawFn) -> Bad:
    """No such command or CONFIG, or a file that is none."""
    command, section, code = draw(COMMANDS), draw(st.sampled_from(sorted(HINTS))), draw(st.sampled_from(NO_CONFIGS))
    file = code if isinstance(code, bytes) else IMPORTS + code
    unknown = TEXT | misspelt(["quickstart", "good.py"]) | st.sampled_from(PATHS)
    bad = [
        Bad([command, "mine.py"], ("CONFIG", "mine.py"), file),
        Bad([command, "mine.py"], (section,), f"{IMPORTS}config = Config({section}={draw(CODE)})"),
        Bad([command, draw(unknown)], ("CONFIG",)),
        Bad([command], ("CONFIG", "nothing")),
        Bad(["list", draw(TEXT.filter(matches_nothing))], ("list",)),
        Bad([draw(WORDS | misspelt(list(cli.COMMANDS))), "good.py"], ("COMMAND",)),
    ]
    return draw(st.sampled_from(bad))


BLOCKED = ["file", "file/below", "/proc/no/such", "x" * 300, "new/" + "x" * 300, "", "/proc/two\nlines"]
PLACES: dict[str, list[str]] = {
    "train --workdir": [*BLOCKED, ".", "notes", "other", "broken", "foreign", "half", "notes/.."],
    "train --compilation-cache": BLOCKED,
    "resources --compilation-cache": BLOCKED,
    "resources --plot": [*BLOCKED, ".", "notes", "x.doc", "png", ".png", "no/x.png", "folder.png", "/proc/x.png"],
    "train --coordinator": ["host:1", "auto:x", "", "x", "\n"],
    "train --processes": ["2", "0", "-1", "x", ""],
    "train --process": ["0", "1", "x", ""],
    "train --coordinator auto --processes": ["2"],
    "train --coordinator auto --process": ["0"],
    "train --coordinator host:1 --processes 2 --process": ["2", "-1", "x", ""],
    "train --coordinator host:1 --process 0 --processes": ["0", "-1", "x", ""],
    "train --processes 2 --process 0 --coordinator": [
        "host",
        ":1",
        "host:",
        "host:x",
        "host:1:",
        "host:99999",
        "x" * 70 + ":1",
    ],
}


@st.composite
def bad_places(draw: st.DrawFn) -> Bad:
    """Where nothing can be read or written, and processes that cannot be found."""
    start = draw(st.sampled_from(sorted(PLACES)))
    command, *words = start.split()
    return Bad([command, "good.py", *words, draw(st.sampled_from(PLACES[start]))], (words[-1],))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a config that is good, and what is in the way."""
    good = f"{IMPORTS}config = override(Config(), {SMALL!r})"
    code = hashlib.sha256(good.encode()).hexdigest()
    same, other = ({"config": to_dict(small_config(runtime__seed=n)), "config_file": code} for n in (0, 5))
    files = {
        "good.py": good,
        "file": "mine",
        "notes/todo.txt": "mine",
        "folder.py/x": "",
        "folder.png/x": "",
        "other/config.json": json.dumps(other),
        "broken/config.json": "{",
        "foreign/config.json": '{"model_type": "vit"}',
        "half/config.json": json.dumps(same),
        "half/summary.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@settings(
    max_examples=int(EXAMPLES or 60),
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(bad=st.one_of(bad_fields(), bad_combinations(), bad_options(), bad_commands(), bad_places()))
def test_bad_input_is_refused_in_one_line(
    bad: Bad,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # a run that begins ends there
    (folder / "mine.py").write_bytes(bad.file.encode() if isinstance(bad.file, str) else bad.file)
    before = content(folder)
    code = cli.main(bad.arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "accepted: " in line
    for part in bad.says:
        assert part.replace("-", "_") in line.replace("-", "_")
    assert content(folder) == before
    assert compiled == []
