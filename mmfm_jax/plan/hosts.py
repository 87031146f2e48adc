"""What feeds a pod: the machines that its chips are plugged into, and the bucket that the studies lie in.

Sources: [doc] docs.cloud.google.com/tpu/docs/v5e, machine type ct5lp-hightpu-4t; [types] ct4p-hightpu-4t,
ct5p-hightpu-4t, ct6e-standard-4t and tpu7x-standard-4t as Google lists them; [gcs] Cloud Storage's pages of quotas,
request rates and prices. Only [doc] was read again for this table: take the others as assumptions, which flags of
`mmfm plan` override.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmfm_jax.plan.chips import Chip

GB = 1e9
CHIPS_A_MACHINE = 4
CORES = {"v4": 240, "v5e": 112, "v5p": 208, "v6e": 180, "tpu7x": 224}  # vCPUs of such a machine [doc, types]
MEMORY_GB = {"v4": 407, "v5e": 192, "v5p": 448, "v6e": 720, "tpu7x": 960}  # [doc, types]
BUCKET_GBPS = 200.0  # an assumption of what a project may draw from one region; more is given on request
FIRST_REQUESTS = 5_000.0  # reads a second that a bucket begins with [gcs]
DOUBLING_MINUTES = 20.0  # a load may double in, while the bucket spreads its keys over more servers [gcs]
REQUEST_PRICE = 0.0004  # USD for 1,000 reads of standard storage in one region [gcs]; S3's GET costs the same
MS_A_DECODED_MB = 1.5  # of a core: 19.0 ms for a crop of 96 x 192 x 192 from chunks of 32^3 (docs/performance.md)


@dataclass(frozen=True)
class Supply:
    """What one host and the bucket give, and what reading costs."""

    cores: float
    """Of a host; vCPUs, as those that decoding was timed on."""
    memory: float
    """Bytes of a host."""
    network: float
    """Bytes a second into a host."""
    bucket: float
    """Bytes a second to all hosts."""
    requests: float | None
    """A second that the bucket takes at most; None where it takes more and more of them as a load lasts."""
    request_price: float
    """USD for 1,000."""
    crop_ms: float | None
    """Of a core for a crop, as `mmfm bench data` prints it of this store; None: by decoded bytes."""


def supply(
    chip: Chip,
    chips: int,
    cores: float | None = None,
    gbps: float | None = None,
    memory_gb: float | None = None,
    bucket_gbps: float | None = None,
    requests: float | None = None,
    request_price: float | None = None,
    crop_ms: float | None = None,
) -> Supply:
    """Of hosts with so many chips each: as published, or as given."""
    share = chips / CHIPS_A_MACHINE
    return Supply(
        cores=cores or CORES[chip.name] * share,
        memory=(memory_gb or MEMORY_GB[chip.name] * share) * GB,
        network=gbps * GB / 8 if gbps else chip.dcn_bandwidth * chips,
        bucket=(bucket_gbps or BUCKET_GBPS) * GB / 8,
        requests=requests,
        request_price=REQUEST_PRICE if request_price is None else request_price,
        crop_ms=crop_ms,
    )
