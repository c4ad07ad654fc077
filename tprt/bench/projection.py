"""What several GPUs would take, from one rank's measured share and latencies that others published.

A projection is no measurement: it stands under its own key, with its formula, and is printed with
that word in front. Knows numbers only.
"""

from typing import Any

# Microseconds of an all-reduce of at most MOST_BYTES over NVLink on H100 and H200, by number of ranks.
# NCCL as engines see it in graphs; fused: one-shot with residual and LayerNorm in the same kernel.
ALL_REDUCE_US: dict[str, dict[int, float]] = {
    "nccl": {2: 10.0, 4: 15.0, 8: 20.0},
    "fused one-shot": {2: 5.5, 4: 6.0, 8: 7.0},
}
MOST_BYTES = 128 * 2**10
SOURCES = "NCCL: vllm#24111, vllm#24532, vllm#33839; fused: FlagGems-vllm#773, flashinfer#5178"
FORMULA = (
    "ms per step = measured ms of rank 0's share, alone on one GPU, + (2 x layers + 2) x latency of an "
    "all-reduce; two per layer, one after the embedding, one exchange of drawn tokens. The fused one "
    "holds the LayerNorm, which the measured share holds too: it is counted twice"
)


def project(
    shard_ms: float, ranks: int, layers: int, batch: int, row_bytes: int
) -> dict[str, Any] | None:
    """Milliseconds and tokens per second of ``ranks`` GPUs; None where no latency is known.

    Args:
        shard_ms: of a decode step of rank 0, measured without collectives.
        row_bytes: of one row of the residual stream.
    """
    if batch * row_bytes > MOST_BYTES or any(ranks not in t for t in ALL_REDUCE_US.values()):
        return None
    found: dict[str, Any] = {}
    for kind, latencies in ALL_REDUCE_US.items():
        ms = shard_ms + (2 * layers + 2) * latencies[ranks] / 1e3
        found[kind] = {
            "all_reduce_us": latencies[ranks],
            "ms_per_step": round(ms, 3),
            "tokens_per_s": round(batch / ms * 1e3, 1),
        }
    return found


def shown(ranks: int, batch: int, context: int, shard_ms: float, found: dict[str, Any]) -> str:
    parts = [f"{kind} {value['tokens_per_s']} tokens/s" for kind, value in found.items()]
    return (
        f"projection, not measured: TP {ranks}, batch {batch}, context {context}: "
        f"{', '.join(parts)} (measured share of one rank {shard_ms:.3f} ms)"
    )
