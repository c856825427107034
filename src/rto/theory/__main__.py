"""``rto theory``: run every study, write its figures and one self-contained page."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the present folder, before anything is imported that might lie there

from pathlib import Path
from time import perf_counter

from rich.table import Table
from rich.text import Text

from rto.errors import make_folder
from rto.flags import OneLine
from rto.terminal import Terminal
from rto.theory.runner import run_all, write
from rto.theory.studies import STUDIES


def main(argv: list[str] | None = None) -> int:
    """Run the studies; 1 if something that must hold did not."""
    parser = OneLine(prog="rto theory", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the page and its figures go")
    parser.add_argument("--seed", type=int, default=0, help="first seed of every study (default 0)")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and sizes, for a first look")
    parser.add_argument("--only", nargs="+", choices=tuple(STUDIES), default=tuple(STUDIES), help="some studies")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    make_folder(args.output_dir, "--output_dir")
    console, start = Terminal(), perf_counter()
    sections = run_all(tuple(args.only), args.seed, args.quick, args.workers, console)
    page = write(sections, args.output_dir, seed=args.seed, quick=args.quick)
    table = Table("statement", "checked", "", title="Theory of RTO", title_justify="left")
    for section in sections:
        for name, holds in section.checks.items():
            table.add_row(section.title, name, Text("holds", "green") if holds else Text("FAILS", "bold red"))
    console.print(table)
    console.print(f"{perf_counter() - start:.0f} s. Open {page}", soft_wrap=True)
    return 0 if all(all(section.checks.values()) for section in sections) else 1


if __name__ == "__main__":
    raise SystemExit(main())
