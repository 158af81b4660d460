"""The tables that `benchmarks.aot` prints."""

from collections.abc import Mapping

import rich.console
import rich.table

GIB = 2**30
console = rich.console.Console()


def report(title: str, figures: dict) -> None:
    """Print the figures as a table."""

    def gib(size: float) -> str:
        return f"{size / GIB:.3f}"

    rows = {kind: gib(size) for kind, size in figures["bytes"].items()}
    if "temporaries" in figures:
        rows["all of these as XLA lays them out"] = gib(figures["arguments"])
        rows["temporaries"] = gib(figures["temporaries"])
    rows["peak"] = gib(figures["peak"])
    fits = "fits" if figures["fits"] else "does not fit"
    rows["memory of the device"] = f"{figures['hbm'] / GIB:g}: {fits}"
    for kind, size in figures.get("collectives", {}).items():
        rows[f"{kind}, output of a call"] = gib(size)
    table = rich.table.Table("of one device", "GiB", title=title)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    if "parts" in figures:
        report_parts(figures["parts"])
    for row in figures.get("largest", ()):
        text = f"{row['bytes'] / 1e6:,.1f} MB in {row['kernels']} kernels of {row['part']}"
        console.print(f"{text}: {row['instruction']}", highlight=False, markup=False)
    line = f"{figures['flops'] / 1e12:.3f} TFLOP on all devices, counted from shapes; "
    line += f"compiled in {figures['compile_s']:.0f} s"
    if loops := figures.get("open_loops"):
        line += f"; {loops} loops whose iterations depend on data are counted once"
    console.print(line)


def report_parts(parts: Mapping[str, dict]) -> None:
    """Print what a GPU does in one pass of each part, and in a whole call."""
    columns = ("one pass of", "passes", "kernels", "waits", "MB", "least MB", "ratio")
    table = rich.table.Table(*columns, title="kernels and bytes of one device")
    total = dict.fromkeys(("kernels", "waits", "bytes", "least_bytes"), 0.0)

    def add(name: str, passes: str, row: Mapping[str, float]) -> None:
        numbers = [f"{row[key]:,.0f}" for key in ("kernels", "waits")]
        sizes = [f"{row[key] / 1e6:,.1f}" for key in ("bytes", "least_bytes")]
        ratio = f"{row['bytes'] / row['least_bytes']:.2f}" if row["least_bytes"] else "-"
        table.add_row(name, passes, *numbers, *sizes, ratio)

    for name, row in parts.items():
        add(name, f"{row['passes']:g}", row)
        total = {key: sum_ + row["passes"] * row[key] for key, sum_ in total.items()}
    table.add_section()
    add("all of a call", "", total)
    console.print(table)
