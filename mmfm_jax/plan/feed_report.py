"""What a plan says of reading: need beside what there is, what bounds the run, and which chunks would be better."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from mmfm_jax.plan.feed import Feed, Need, best_chunks
from mmfm_jax.plan.hosts import FIRST_REQUESTS

SAID = {
    "bucket": "bucket, all hosts together",
    "requests": "requests, all hosts together",
    "network": "network of a host",
    "host cores": "cores of a host",
    "host memory": "memory of a host",
}


def report(feed: Feed, others: dict[str, Feed], assumed: bool) -> RenderableType:
    """`assumed`: no store was looked at."""
    table = Table(title=f"Can {feed.hosts} hosts feed it? ({feed.studies:,.1f} studies a second and host)")
    table.add_column("what")
    for name in ("need", "have", "load"):
        table.add_column(name, justify="right")
    for need in feed.needs:
        have = _amount(need, need.have) if need.have else f"{FIRST_REQUESTS:,.0f} at first"
        table.add_row(SAID[need.name], _amount(need, need.need), have, f"{100 * need.load:.0f}%" if need.have else "")
    table.add_row("price of the requests", f"{feed.request_usd:,.0f} USD a day", "", "")
    chunks = ", ".join(f"{name} {'x'.join(map(str, chunk))}" for name, chunk in feed.chunks.items()) or "no images"
    read = (
        f"A study costs {feed.reading.requests:.1f} requests, {feed.reading.bytes / 1e6:.1f} MB and "
        f"{feed.core_ms:.1f} ms of a core (chunks: {chunks}{', an assumption: --store looks' if assumed else ''})."
    )
    if feed.again > 1:
        read += f" Each is read {feed.again:g} times, since hosts share studies."
    if feed.ramp_hours:
        read += f" A bucket that doubles its rate every 20 minutes takes all of it after {feed.ramp_hours:.1f} hours."
    parts: list[RenderableType] = [table, read, _verdict(feed)]
    if others:
        parts.append(_chunks(feed, others))
    return Group(*parts)


def _verdict(feed: Feed) -> str:
    if feed.slowest is None:
        worst = max(feed.needs, key=lambda need: need.load)
        return f"The chips bound the run; the next is the {SAID[worst.name]} at {100 * worst.load:.0f}%."
    return (
        f"The {SAID[feed.bound]} bounds the run: a step would take {feed.slowdown:.2f} times the "
        f"{feed.step_seconds:.3g} s of the chips."
    )


def _chunks(feed: Feed, others: dict[str, Feed]) -> Table:
    best = best_chunks(others)
    table = Table(title="Had its volumes other chunks", caption=f"Best: {best}.")
    table.add_column("chunks")
    for name in ("requests", "MB", "requests/s", "USD a day", "bucket", "cores", "bound"):
        table.add_column(name, justify="right")
    for name, of in {"as they are": feed, **others}.items():
        load = {need.name: f"{100 * need.load:.0f}%" for need in of.needs}
        table.add_row(
            f"{name} *" if name == best else name, f"{of.reading.requests:.1f}", f"{of.reading.bytes / 1e6:.1f}",
            f"{of.requests:,.0f}", f"{of.request_usd:,.0f}", load["bucket"], load["host cores"], of.bound,
        )  # fmt: skip
    return table


def _amount(need: Need, value: float) -> str:
    if need.unit == "B/s":
        return f"{8 * value / 1e9:,.1f} Gbit/s"
    if need.unit == "B":
        return f"{value / 1e9:,.1f} GB"
    return f"{value:,.0f}/s" if need.unit == "/s" else f"{value:,.1f}"


def as_json(feed: Feed, others: dict[str, Feed], assumed: bool) -> dict[str, Any]:
    """Rates are a second; `network`, `host cores` and `host memory` are of the host that reads most."""
    return {
        "assumed_store": assumed,
        "hosts": feed.hosts,
        "studies_per_second_of_a_host": feed.studies,
        "times_a_study_is_read": feed.again,
        "chunks": feed.chunks,
        "requests_per_study": feed.reading.requests,
        "bytes_per_study": feed.reading.bytes,
        "core_ms_per_study": feed.core_ms,
        "needs": {need.name: {"need": need.need, "have": need.have, "unit": need.unit} for need in feed.needs},
        "request_usd_per_day": feed.request_usd,
        "hours_until_the_bucket_takes_all_requests": feed.ramp_hours,
        "bound": feed.bound,
        "slowdown": feed.slowdown,
        "other_chunks": {
            name: {
                "requests_per_study": of.reading.requests,
                "bytes_per_study": of.reading.bytes,
                "request_usd_per_day": of.request_usd,
                "bound": of.bound,
                "slowdown": of.slowdown,
            }
            for name, of in others.items()
        },
        "best_chunks": best_chunks(others),
    }
