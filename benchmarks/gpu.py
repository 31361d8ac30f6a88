"""Measure this package on an accelerator, in ten minutes: ``python benchmarks/gpu.py``.

The steps are ordered by worth. Each is a process of its own with a limit of its own, and what it measures is written
as it comes (``gpu.json`` and ``gpu.md`` in ``--out``; ``gpu.log`` has what a step printed beyond that), so that a run
that is cut off still counts. ``--plan`` prints the steps; ``--tiny`` runs all of them in small on any device, also a
CPU; ``--only STEP ...`` runs some of them; ``--keep`` adds to the results that are there: it leaves out steps that have
been completed, unless ``--only`` names them, and rows that are there.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwfedssl_jax"  # of programs, as in a run
NO_ACCELERATOR = 3  # exit code of a step


class Step(NamedTuple):
    """A step: what it measures, and the most seconds that it may take."""

    name: str
    about: str
    seconds: int


STEPS = [
    Step("machine", "versions, device, memory, measured peaks of matrix products and of copying", 30),
    Step("parity", "one round on the accelerator against the CPU, by precision", 90),
    Step("lanes", "digits: client steps a second with 1, 10 and 100 lanes, and with lanes chosen automatically", 70),
    Step("stages", "ViT-Tiny, batch 512: client steps a second by strategy, stage, precision and lanes", 150),
    Step("rival", "the same rounds in PyTorch: eager, compiled, with CUDA graphs", 150),
    Step("memory", "peak memory of a client's step: measured against the ledger's", 45),
    Step("kernels", "the longest kernels of a round's trace, and a step's share of the measured peaks", 50),
    Step("clients", "clients a second: 1,000 and 10,000 of log-normal sizes, and a population of 1,000,000", 50),
    Step("seeds", "8 seeds in one program against one after the other", 40),
    Step("feed", "images streamed against resident", 35),
    Step("resnet", "ResNet-18: lanes under vmap against one after the other", 60),
    Step("stages_64", "ViT-Tiny, batch 64: as stages", 80),
]


def main() -> None:
    options = parse()
    if options.plan:
        so_far = itertools.accumulate(step.seconds for step in STEPS)
        print("   step       at most  so far")
        for number, (step, seconds) in enumerate(zip(STEPS, so_far, strict=True), 1):
            print(f"{number:2} {step.name:<10} {step.seconds:5} s {seconds:5} s  {step.about}")
        print(f"cut off after {options.minutes:g} min; `--keep` continues with what was not reached")
        return
    # A test of this script must not replace measurements.
    out = options.out or (Path(tempfile.mkdtemp()) if options.tiny else HERE / "results")
    if out.exists() and not out.is_dir():
        refuse(f"--out: {out} is not a folder; accepted: a folder")
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, options.keep, options.tiny)
    print(f"results: {out}", flush=True)
    end = time.monotonic() + 60 * options.minutes
    for step in STEPS:
        if step.name in options.only if options.only else step.name not in results.content["completed"]:
            left = end - time.monotonic()
            if left < 5:
                results.note(step.name, "not reached")
                continue
            run_step(step, left if options.tiny else min(step.seconds, left), results, tiny=options.tiny)
    print(results.table())
    if not results.measured:
        sys.exit("nothing was measured")


def refuse(why: str) -> NoReturn:
    """End with a line about an option, before anything is written."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--plan", action="store_true", help="print the steps and exit")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test of this script")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin and continue no step after this time")
    parser.add_argument("--only", nargs="+", choices=names, help="run these steps alone")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there")
    parser.add_argument(
        "--out", type=Path, help="folder of gpu.json and gpu.md; by default results, or a new one for --tiny"
    )
    options = parser.parse_args()
    if options.minutes <= 0:
        refuse(f"--minutes: {options.minutes} is out of range; accepted: above 0")
    return options


class Results:
    """What has been measured, on disk after each measurement."""

    def __init__(self, folder: Path, keep: bool, tiny: bool) -> None:
        self._json, self._table, self._log = folder / "gpu.json", folder / "gpu.md", folder / "gpu.log"
        command = " ".join(["python", *sys.argv])
        self.content: dict[str, Any] = {"tiny": tiny, "runs": [], "rows": [], "notes": [], "completed": []}
        if self._json.exists():
            if not keep:
                refuse(f"--out: {folder} has results; accepted: --keep to add to them, or another folder")
            try:
                self.content |= json.loads(self._json.read_text())
            except (ValueError, TypeError) as error:
                refuse(f"--keep: {self._json} cannot be read ({error}); accepted: what this script has written")
            if self.content["tiny"] != tiny:
                refuse(
                    f"--keep: {self._json} is of a run {'without' if tiny else 'with'} --tiny; accepted: another --out"
                )
        self.content["runs"].append({"command": command, "date": datetime.date.today().isoformat()})

    @property
    def measured(self) -> list[list[str]]:
        """Step and case of all rows."""
        return [[row["step"], row["case"]] for row in self.content["rows"]]

    def check_device(self, device: str) -> None:
        """Refuse to put measurements of two kinds of devices into one table."""
        if self.content.setdefault("device", device) != device:
            refuse(f"--keep: {self._json} is of {self.content['device']}, not of {device}; accepted: another --out")

    def add(self, row: dict[str, Any]) -> None:
        """Add a row: ``step``, ``case``, ``value``, ``unit``, and what else was measured."""
        if [row["step"], row["case"]] not in self.measured:
            self.content["rows"].append(row)
            self._write()

    def note(self, step: str, text: str) -> None:
        """Add a remark about a step, such as why it ended early."""
        self.content["notes"].append({"step": step, "note": text})
        print(f"{step}: {text}", flush=True)
        self._write()

    def log(self, step: str, line: str) -> None:
        """Keep a line that a step, or a library that it uses, has printed."""
        with self._log.open("a") as file:
            file.write(f"{step}: {line}\n")

    def complete(self, step: str) -> None:
        """Record that a step has run to its end."""
        self.content["completed"] = sorted({*self.content["completed"], step})
        self._write()

    def _write(self) -> None:
        self._json.write_text(json.dumps(self.content, indent=1) + "\n")
        self._table.write_text(self.table())

    def table(self) -> str:
        """All results as Markdown."""
        lines = ["| step | case | value | unit | also |", "|---|---|---|---|---|"]
        for row in self.content["rows"]:
            more = {
                k: v for k, v in row.items() if k not in ("step", "case", "value", "unit", "runs", "work", "chosen")
            }
            words = ", ".join(f"{k} {number(v)}" for k, v in more.items())
            lines.append(f"| {row['step']} | {row['case']} | {number(row['value'])} | {row['unit']} | {words} |")
        lines += [*self._automatic_lanes(), *self._against_rivals()]
        lines += [f"\n{note['step']}: {note['note']}" for note in self.content["notes"]]
        return "\n".join(lines) + "\n"

    def _automatic_lanes(self) -> list[str]:
        """Lanes chosen automatically against the best number that was measured, for the same work."""
        rows = [row for row in self.content["rows"] if row["step"] in ("lanes", "stages", "stages_64")]
        lines = ["", "| lanes chosen automatically | best measured | automatic / best |", "|---|---|---|"]
        for row in [row for row in rows if row["chosen"]]:
            same = [other for other in rows if [other["work"], other["remat"]] == [row["work"], row["remat"]]]
            best = max(same, key=lambda other: other["value"])
            lines.append(f"| {row['case']}: {row['lanes']} | {best['lanes']} | {row['value'] / best['value']:.2f} |")
        return lines if len(lines) > 3 else []

    def _against_rivals(self) -> list[str]:
        """Our best number of lanes against each way to run PyTorch, for the same work on the same card."""
        rows = [row for row in self.content["rows"] if "work" in row]
        rivals = [row for row in rows if row["step"] == "rival"]
        lines = ["", "| PyTorch, one client after the other | ours, best | ours / PyTorch |", "|---|---|---|"]
        for rival in rivals:
            ours = [row for row in rows if row["step"] != "rival" and row["work"] == rival["work"]]
            if ours:
                best = max(ours, key=lambda row: row["value"])
                lines.append(f"| {rival['case']} | {best['case']} | {best['value'] / rival['value']:.2f} |")
        return lines if rivals else []


def number(value: Any) -> str:
    """Four digits of a number; anything else as it is."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def run_step(step: Step, seconds: float, results: Results, *, tiny: bool) -> None:
    """Run a step in a process of its own, and take up its lines as they come."""
    print(f"== {step.name}: {step.about}", flush=True)
    request = json.dumps({"step": step.name, "tiny": tiny, "measured": results.measured})
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85" if step.name != "rival" else "0.1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "") if tiny else "",  # the CPU is there as well
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)),
    }
    if tiny:  # what runs for a moment only need not be compiled well
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    command = ["timeout", "-k", "5", str(int(seconds) + 1), sys.executable, str(HERE / "gpu_steps.py"), request]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    said: list[str] = []
    for line in process.stdout or ():
        message = read_message(line)
        if "device" in message:
            results.check_device(message["device"])
        elif "note" in message:
            results.note(step.name, message["note"])
        elif "case" in message:
            results.add({"step": step.name} | message)
            print(f"   {message['case']}: {number(message['value'])} {message['unit']}", flush=True)
        else:
            said.append(line.rstrip())
            results.log(step.name, said[-1])
    code, last = process.wait(), " | ".join(said[-3:])
    if code == NO_ACCELERATOR:
        sys.exit("JAX finds no accelerator; --tiny runs on any device")
    if code in (124, 137):
        results.note(step.name, f"cut off after {time.monotonic() - began:.0f} s ({last})")
    elif code:
        results.note(step.name, f"ended with code {code}: {last}")
    else:
        results.complete(step.name)


def read_message(line: str) -> dict[str, Any]:
    """A step's message, or an empty dict for a line that something else has printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


if __name__ == "__main__":
    main()
