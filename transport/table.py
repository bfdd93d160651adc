"""The table of `python -m transport.bench`: a row a transport and size, medians and quartiles."""

from __future__ import annotations

import statistics
from typing import Any, Final

COLUMNS: Final = ("half round trip", "fresh", "one way", "both ways")  # seconds, then bytes/second

HEADING: Final = (
    f"{'bytes':>9}  {'':<10} {'half trip us':>10} {'[quartiles':>11} {'':>9}] {'fresh us':>8} "
    f"{'1-way GB/s':>8} {'both':>6}"
)


def row(name: str, nbytes: int, columns: dict[str, list[float]]) -> dict[str, Any]:
    """Return what was measured of one transport and size, as the JSON holds it."""
    made: dict[str, Any] = {"transport": name, "nbytes": nbytes}
    for column, values in columns.items():
        key = column.replace(" ", "_")
        scale, unit = (1e6, "us") if column in COLUMNS[:2] else (1e-9, "gb_per_s")
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        made[f"{key}_{unit}"] = round(statistics.median(values) * scale, 3)
        made[f"{key}_{unit}_quartiles"] = [round(quarters[i] * scale, 3) for i in (0, 2)]
    return made


def line(row: dict[str, Any]) -> str:
    """Return a row as it is printed below the heading."""
    low, high = row["half_round_trip_us_quartiles"]
    return (
        f"{row['nbytes']:>9}  {row['transport']:<10} {row['half_round_trip_us']:>10.1f} "
        f"[{low:>9.1f} {high:>9.1f}] {row['fresh_us']:>10.1f} "
        f"{row['one_way_gb_per_s']:>8.2f} {row['both_ways_gb_per_s']:>8.2f}"
    )
