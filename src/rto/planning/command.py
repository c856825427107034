"""`rto plan RECIPE --devices 8 --memory 80`: what a run needs and whether it fits, before anything is paid for."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from rto.planning.job import TOKENS, Change, Phase, Rates, Variant, changes, variants
from rto.planning.memory import Memory, Placement
from rto.planning.shapes import Lora, Shape
from rto.planning.workload import Workload, shapes_of, workload
from rto.recipe import Recipe
from rto.terminal import Terminal

GB = 1e9
TFLOPS = {2: 989.0, 4: 67.0}
"""Dense bf16 and plain fp32 of an H100 SXM by its data sheet, 10¹² operations a second."""
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `rto plan` tells."""

    recipe: str
    devices: int
    memory: float
    shapes: dict[str, Shape]
    workload: Workload
    rates: Rates
    variants: list[Variant]
    shown: Variant
    phases: list[Phase]
    changes: list[Change]

    def tokens(self, fewer: int | None) -> int | None:
        """Tokens a pass that fit, of the recipe's."""
        return None if fewer is None else self.workload.tokens // fewer


def plan(
    recipe: Recipe,
    *,
    name: str,
    devices: int,
    memory: float,
    configs: dict[str, str] | None = None,
    method: str | None = None,
    rates: Rates | None = None,
    shown: int | None = None,
) -> Plan:
    """A recipe on so many devices with so many bytes each.

    Args:
        recipe: what to run.
        name: how the plan calls it.
        devices: processes, one a device.
        memory: bytes of a device.
        configs: configurations by role, in the place of the recipe's models.
        method: whose iterations; the one with most models unless named.
        rates: how fast a device is; by default an H100's.
        shown: number of the variant whose phases are told, from 1; by default the first that fits, or else the
            recipe's own way.

    Raises:
        ValueError: a number is not positive, a role or a method is not known, or a model has no configuration.
    """
    if devices < 1 or memory <= 0:
        raise ValueError(f"a plan needs at least one device and memory above 0, got {devices} and {memory / GB:g} GB")
    shapes = shapes_of(recipe, configs or {})
    work = workload(recipe, shapes, method=method)
    lora = work.lora or Lora(rank=RANK, targets=frozenset(x.name for x in shapes["policy"].linears))
    plain = Placement(devices=devices, compute=work.compute, moments=work.moments)
    every = variants(work.job, plain, lora, memory, offloads=work.offload)
    own = next(v for v in every if v.place == replace(plain, lora=work.lora, offload=work.offload))
    if shown is not None and not 1 <= shown <= len(every):
        raise ValueError(f"--variant {shown}: choose from 1 to {len(every)}")
    chosen = every[shown - 1] if shown else own if own.fits else next((v for v in every if v.fits), own)
    return Plan(
        recipe=name,
        devices=devices,
        memory=memory,
        shapes=shapes,
        workload=work,
        rates=rates or Rates(operations=TFLOPS[work.compute] * 1e12),
        variants=every,
        shown=chosen,
        phases=work.job.phases(chosen.place),
        changes=[] if own.fits else changes(work.job, own.place, lora, memory),
    )


# --- the command


def main(args: list[str]) -> int:
    """`rto plan`."""
    from transformers.utils import logging as hf_logging

    from rto.flags import OneLine, overrides
    from rto.recipe import load_recipe

    parser = OneLine(
        prog="rto plan",
        description="Parameters, memory, arithmetic and time of a recipe from configurations alone, and whether it "
        "fits. Keys of the recipe are overridden by their dotted names, as in rto run.",
    )
    add = parser.add_argument
    add("recipe", help="path of a recipe")
    add("--devices", type=int, default=1, help="processes, one a device (1)")
    add("--memory", type=float, default=80.0, help="of a device, in GB of 10⁹ bytes (80)")
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="ROLE=FILE_OR_SHAPE",
        help="a folder, a config.json or a named shape",
    )
    add("--method", help="whose iterations; the one with most models")
    add("--variant", type=int, help="number of the variant whose phases are shown; the first that fits")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--tflops", type=float, help="dense matrix rate of a device; an H100's: 989 in bf16, 67 in fp32")
    add("--utilisation", type=float, default=Rates.utilisation, help="share of it that training reaches (0.4)")
    add("--bandwidth", type=float, default=Rates.bandwidth / GB, help="of a device's memory, GB/s (3350: H100)")
    add("--link", type=float, default=Rates.link / GB, help="to other devices of a host, GB/s (450: NVLink 4)")
    add("--network", type=float, default=Rates.network / GB, help="of a device to other hosts, GB/s (50: 400 Gb/s)")
    add("--reached", type=float, default=Rates.reached, help="share of the memory's bandwidth that is reached (0.7)")
    add("--host", type=float, default=Rates.host / GB, help="between device and host memory, GB/s (55: PCIe 5)")
    add("--per_host", type=int, default=Rates.per_host, help="devices of a host (8)")
    flags, rest = parser.parse_known_args(args)
    for name in ("tflops", "utilisation", "bandwidth", "reached", "link", "network", "host", "per_host"):
        if (value := getattr(flags, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, got {value:g}")
    hf_logging.set_verbosity_error()
    recipe = load_recipe(flags.recipe, overrides(rest, [f.name for f in fields(Recipe)], parser.flags))
    rates = Rates(
        operations=(flags.tflops or 0.0) * 1e12,
        utilisation=flags.utilisation,
        bandwidth=flags.bandwidth * GB,
        reached=flags.reached,
        link=flags.link * GB,
        network=flags.network * GB,
        host=flags.host * GB,
        per_host=flags.per_host,
    )
    found = plan(
        recipe,
        name=flags.recipe,
        devices=flags.devices,
        memory=flags.memory * GB,
        configs=dict(map(_by_role, flags.config)),
        method=flags.method,
        shown=flags.variant,
    )
    found = replace(found, rates=replace(rates, operations=rates.operations or found.rates.operations))
    console = Terminal()
    if flags.json:
        console.print_json(json.dumps(as_json(found)))
    else:
        show(found, console)
    return 0


def _by_role(given: str) -> tuple[str, str]:
    role, equals, source = given.partition("=")
    if not equals or not source:
        raise ValueError(f"--config {given}: expected ROLE=FILE_OR_SHAPE")
    return role, source


# --- what it prints


def as_json(found: Plan) -> dict[str, Any]:
    """Everything in bytes, operations and seconds."""
    return {
        "recipe": found.recipe,
        "devices": found.devices,
        "memory": found.memory,
        "method": found.workload.method,
        "parameters": {
            role: x.scalar_model if role in ("critic", "reward") else x.language_model
            for role, x in found.shapes.items()
        },
        "variants": [
            {
                "name": v.name,
                "peak": v.peak.memory.total,
                "phase": v.peak.name,
                "fits": v.fits,
                "tokens_a_pass_that_fit": found.tokens(v.fewer),
            }
            for v in found.variants
        ],
        "shown": found.shown.name,
        "phases": [
            {
                "name": x.name,
                "per": x.per,
                "memory": {**asdict(x.memory), "total": x.memory.total},
                "operations": x.work.operations,
                "bytes": x.work.bytes,
                "traffic": x.traffic,
                "loaded": x.loaded,
                "seconds": x.seconds(found.rates, found.devices),
            }
            for x in found.phases
        ],
        "roles": {role.name: asdict(x) for role, x in at_rest(found)},
        "changes": [
            {
                "names": list(x.names),
                "peak": x.peak.memory.total,
                "phase": x.peak.name,
                "fits": x.fits,
                "tokens_a_pass": found.tokens(x.times) if TOKENS in x.names else None,
            }
            for x in found.changes
        ],
        "rates": asdict(found.rates),
        "notes": list(found.workload.notes),
    }


def at_rest(found: Plan) -> list[tuple[Any, Memory]]:
    """What each role of the iterations holds all the time, with its gradients, under the shown variant."""
    place = found.shown.place
    roles = getattr(found.workload.job.parts[-1], "roles", ())
    return [(x, place.resting([x]) + Memory(gradients=place.gradients(x))) for x in roles]


def variant_rows(found: Plan) -> list[dict[str, str]]:
    """The variants as a table."""
    return [
        {
            "": str(i),
            "variant": v.name,
            "peak, GB": f"{v.peak.memory.total / GB:.1f}",
            "in": v.peak.name,
            "fits": verdict(v),
        }
        for i, v in enumerate(found.variants, 1)
    ]


def verdict(v: Variant) -> str:
    """Whether a variant fits, or with passes of how much fewer tokens."""
    if v.fits:
        return "yes"
    return "no" if v.fewer is None else f"with passes cut to 1/{v.fewer}"


def memory_rows(found: Plan) -> list[dict[str, str]]:
    """Memory of the shown variant's phases as a table, GB."""
    parts = [f.name for f in fields(Memory)]
    return [
        {"phase": x.name}
        | {name: f"{getattr(x.memory, name) / GB:.1f}" for name in parts}
        | {"all, GB": f"{x.memory.total / GB:.1f}"}
        for x in found.phases
    ]


def work_rows(found: Plan) -> list[dict[str, str]]:
    """Arithmetic, bytes and time of the shown variant's phases as a table."""
    return [
        {
            "phase": x.name,
            "for an": x.per,
            "10¹² operations": f"{x.work.operations / 1e12:,.0f}",
            "GB of memory moved": f"{x.work.bytes / GB:,.0f}",
            "GB from other devices": f"{x.traffic / GB:,.0f}",
            "GB from the host": f"{x.loaded / GB:,.0f}",
            "seconds": f"{x.seconds(found.rates, found.devices):.1f}",
        }
        for x in found.phases
    ]


def role_rows(found: Plan) -> list[dict[str, str]]:
    """The roles of an iteration as a table."""
    return [
        {
            "role": role.name,
            "model": role.shape.name,
            "parameters": f"{role.parameters / GB:.2f} · 10⁹",
            "trained": f"{found.shown.place.learns(role) / GB:.2f} · 10⁹" if role.trained else "—",
            "weights, GB": f"{memory.weights / GB:.1f}",
            "gradients": f"{memory.gradients / GB:.1f}",
            "moments": f"{memory.moments / GB:.1f}",
        }
        for role, memory in at_rest(found)
    ]


def change_rows(found: Plan) -> list[dict[str, str]]:
    """What would make the recipe's own way fit."""
    return [
        {
            "change": " + ".join(x.names) + (f": 1/{x.times}" if x.times > 1 and x.fits else ""),
            "peak, GB": f"{x.peak.memory.total / GB:.1f}",
            "in": x.peak.name,
            "fits": "yes" if x.fits else "no",
        }
        for x in found.changes
    ]


def show(found: Plan, console: Console) -> None:
    """Tables in the terminal."""
    rates = found.rates
    console.print(
        f"{found.recipe}: {found.devices} × {found.memory / GB:g} GB"
        + (f", method {found.workload.method}" if found.workload.method else ""),
        highlight=False,
    )
    _print(console, "Variants", variant_rows(found))
    if found.changes:
        _print(console, "The recipe as it stands does not fit; what would change that", change_rows(found))
    _print(console, f"Roles at rest: {found.shown.name}", role_rows(found))
    _print(console, f"Memory of one device: {found.shown.name}", memory_rows(found))
    _print(console, f"Work of one device: {found.shown.name}", work_rows(found))
    console.print(
        f"Assumed, not measured: {rates.operations / 1e12:g} · 10¹² operations a second, {rates.utilisation:.0%} of "
        f"them reached; memory {rates.bandwidth / GB:g} GB/s, {rates.reached:.0%} reached; links {rates.link / GB:g} "
        f"GB/s in a host, {rates.network / GB:g} between hosts. Rows of full length. Off-loading is "
        "offload_frozen, which FSDP2 does not have: its own (cpu_offload) takes trained models along.",
        *found.workload.notes,
        sep="\n",
        highlight=False,
    )


WORDS = ("variant", "in", "fits", "phase", "change", "role", "model", "for an")
"""Columns that are no numbers."""


def _print(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in WORDS else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
