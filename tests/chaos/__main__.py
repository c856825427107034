"""Kills at random moments, and malformed inputs: what is tried, what comes through, what is lost.

usage: python tests/chaos [--kills N] [--inputs N] [--minutes M] [--seed N] [--only NAME ...]

A kill is SIGKILL, SIGTERM or SIGINT at a moment drawn from ``--seed``; the same command then goes on, and is hit
again, until it ends. What it leaves must be what the command leaves when nobody disturbs it: weights byte by byte,
logs but for the clock, results, answers, judgments. An input is a file or flag that was spoilt; the command must end
by itself, with exit code 0 where the rest could be used, or 2 and one line that names the file and the row, or the
key. Exit code 1 when anything is lost.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from inputs import drawn, every_input, feed, misbehave
from kills import SUBJECTS, Campaign, World, judging
from world import build_models, import_everything


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30, help="no further kill or input is begun after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="subjects whose name begins so")
    parser.add_argument(
        "--kind", nargs="+", default=[], help="inputs whose name begins so: data, model/config.json, …"
    )
    given = parser.parse_args()
    import_everything()
    begun, failed = time.monotonic(), False
    names = [n for n in SUBJECTS if not given.only or any(n.startswith(x) for x in given.only)]
    with tempfile.TemporaryDirectory(prefix="rto-chaos-") as place:
        base = Path(place)
        models = build_models(base / "models")
        if given.kills and names:
            failed |= kill(names, given, base, models, begun + 60 * given.minutes * (0.7 if given.inputs else 1.0))
        if given.inputs and (not given.only or "inputs" in given.only):
            failed |= spoil(given, base, models, begun + 60 * given.minutes)
    print(f"seed {given.seed}, {time.monotonic() - begun:.0f} s")
    return int(failed)


def kill(names: list[str], given: argparse.Namespace, base: Path, models: dict[str, str], deadline: float) -> bool:
    """Kill each subject in its share of the time; whether anything was lost."""
    failed, total = False, 0
    with judging(base / "asked") as url:
        for i, name in enumerate(names):
            (base / name).mkdir()
            world = World(base / name, models, url, base / "asked")
            now, rest = time.monotonic(), len(names) - i
            count = (given.kills - total) // rest
            share = SUBJECTS[name].weight / sum(SUBJECTS[other].weight for other in names[i:])
            found = Campaign(name, SUBJECTS[name], world, random.Random(f"{given.seed} {name}")).run(
                count, now + max(deadline - now, 0) * share
            )
            total += found["tried"]
            ends = {kind: found.pop(kind, 0) for kind in ("tried", "ended", "lost", "stuck", "unsaid")}
            how = ", ".join(f"{n} {signal}" for signal, n in sorted(found.items()))
            print(f"{name}: {', '.join(f'{n} {kind}' for kind, n in ends.items())} ({how})", flush=True)
            failed |= any(ends[kind] for kind in ("lost", "stuck", "unsaid"))
            shutil.rmtree(base / name, ignore_errors=True)
    print(f"kills: {total}")
    return failed


def spoil(given: argparse.Namespace, base: Path, models: dict[str, str], deadline: float) -> bool:
    """Feed malformed inputs, as many of each kind; whether one was not told in a line, or took no end."""
    failed, total = False, Counter[str]()
    with judging(base / "asked", misbehave) as url:
        known = every_input(models, base, url)
        known = {
            kind: [x for x in inputs if not given.kind or x.name.startswith(tuple(given.kind))]
            for kind, inputs in known.items()
        }
        print(f"{sum(map(len, known.values())):,} inputs are known", flush=True)
        found = feed(drawn(known, given.inputs, random.Random(given.seed)), base, deadline)
        for kind, counts in found.items():
            print(f"{kind}: {', '.join(f'{n} {what}' for what, n in counts.items())}", flush=True)
            failed |= bool(counts.keys() - {"tried", "used", "refused"})
            total += counts
    print(f"inputs: {', '.join(f'{n} {what}' for what, n in total.items())}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
