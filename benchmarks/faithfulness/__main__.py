"""Measure: `python -m benchmarks.faithfulness --sets efficientnet,digits-cnn --methods auto,epsilon --items 50`.

One file for each set and method, `<out>/<set>/<method>.json`. What is there and was made with the same settings is not
measured again. A method is a preset (with options: `gamma{gamma=0.1}`; on differences to a reference: `epsilon@mean`),
`integrated gradients` or a control.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks._measure import machine
from benchmarks.faithfulness.dataset import DataSet, Split
from benchmarks.faithfulness.measure import LEDGERS, SCORE, SENSITIVE, Record, Scores, measure
from benchmarks.faithfulness.methods import fingerprint, names_for
from benchmarks.faithfulness.sets import ITEMS, load
from dlbc.errors import DlbcError

VERSION = 1
"""Raise when what is measured changes."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; 1 when a method failed on a set."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    split: Split = options.split
    failed = 0
    for name in options.sets.split(",") if options.sets else list(ITEMS):
        data = load(name, split, options.items).to(options.device)
        _say(f"{name}: {len(data.items)} items of {len(set(data.groups))} examples ({split}), accuracy "
             f"{data.accuracy:.3f}")
        scores = Scores(data)
        for method in options.methods.split(",") if options.methods else names_for(data):
            path = Path(options.out) / name / f"{file_name(method)}.json"
            settings = _settings(data, method)
            if not options.again and _done(path, settings):
                continue
            failed += not _measured(data, method, scores, path, settings)
    return int(failed > 0)


def file_name(method: str) -> str:
    """A method's name as a file's: letters, digits, dots, signs of options as `-`."""
    return re.sub(r"[^\w.@]+", "-", method).strip("-")


def _measured(data: DataSet, method: str, scores: Scores, path: Path, settings: Record) -> bool:
    started = time.perf_counter()
    bar = _Bar(f"{data.name} / {method}", len(data.items))
    head: Record = {"set": data.name, "method": method, "kind": data.kind, "settings": settings,
                    "items": len(data.items), "groups": list(data.groups), "accuracy": round(data.accuracy, 4)}
    try:
        record = head | measure(data, method, scores, bar.tick)
    except (DlbcError, ArithmeticError) as problem:
        record = head | {"error": f"{type(problem).__name__}: {problem}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in
                       (record | {"machine": machine()}).items())
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    os.replace(part, path)
    bar.close()
    _say(f"  {method:<22}{_summary(record)}  {time.perf_counter() - started:.0f} s")
    return "error" not in record


def _settings(data: DataSet, method: str) -> Record:
    return {"version": VERSION, "split": data.split, "items": len(data.items), "units": repr(data.units)[:80],
            "fills": [fill.name for fill in data.fills], "score": SCORE, "steps": data.steps, "sensitive": SENSITIVE,
            "ledgers": LEDGERS, "method": fingerprint(method)}


def _done(path: Path, settings: Record) -> bool:
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("settings") == settings and "error" not in found


def _summary(record: Record) -> str:
    from benchmarks.faithfulness.tables import Row

    if "error" in record:
        return f"FAILED {str(record['error']).splitlines()[0]:.90}"
    row = Row.of(record)
    areas = "  ".join(f"{fill} {area}" for fill, area in row.areas.items())
    return f"{areas}  sr {row.sr:.2f} rr {row.rr:.2f}  cost {row.time:.2f} (flops {row.flops:.2f})"


class _Bar:
    """Items done, on stderr, where it is a terminal."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.shown = label, total, 0, sys.stderr.isatty()

    def tick(self) -> None:
        self.done += 1
        if self.shown:
            sys.stderr.write(f"\r\x1b[K{self.label}: {self.done} of {self.total}")
            sys.stderr.flush()

    def close(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="", help=f"of: {', '.join(ITEMS)} (default: all)")
    parser.add_argument("--methods", default="", help="default: all that make sense for the model")
    parser.add_argument("--items", type=int, help="at most so many of each set (default: as published)")
    parser.add_argument("--split", choices=("held", "tune"), default="held")
    parser.add_argument("--out", default="benchmarks/results/faithfulness")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
