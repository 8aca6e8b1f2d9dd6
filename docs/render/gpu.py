"""The results page's section on a GPU, from a file of benchmarks/gpu_attention.py; nothing where there is none."""

from docs.render.markdown import markdown
from docs.render.spread import Spread, figures, inverse
from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows

#: docs/gpu.md: what was aimed at, before anything was measured.
AGAINST_STORED, TIMES_FLOOR, SEALING_SHARE, SHARE_CONTEXT = 0.97, 2.0, 0.01, 32768


def gpu_section(result: Result) -> str:
    """Decode attention, the check against stored(n), sealing's share and its distance from the byte floor."""
    device, parameters = result["device"], result["parameters"]
    notes = [
        f"- not measured: {', '.join(f'{key} {value}' for key, value in cell.items() if key != 'reason')}: "
        f"{cell['reason']}."
        for cell in result["skipped"]
    ]
    return "\n".join(
        [
            f"{device['name']}, ratio {parameters['pruning_ratio']:g}, {parameters['dtype']}, blocks of "
            f"{parameters['block_size']}, {parameters['repeats']} interleaved repeats. A step is the attention of the "
            "layers measured, as one CUDA graph. Speeds are times those of the same kernel over n tokens, and over "
            "only stored(n) tokens; above 1 is faster. Sealing's share is of sealing and attention alone. The floor is "
            f"the bytes a seal must move at {device['copy_bytes_per_s'] / 1e9:.0f} GB/s, a plain copy's speed.\n",
            markdown(_decode(result)) + "\n" if result["decode"] else "",
            markdown(_aims(result)) + "\n",
            markdown(_sealing(result)) + "\n",
            *notes,
        ]
    )


def _decode(result: Result) -> Rows:
    rows: Rows = [
        ["shape", "kernel", "requests", "tokens each", "layers", "times the kernel over n", "spread",
         "times the kernel over stored(n)", "spread", "sealing's share, together", "one by one"],
    ]  # fmt: skip
    for cell in result["decode"]:
        share = cell["sealing_share"]
        rows.append(
            [
                *(str(cell[key]) for key in ("shape", "kernel", "batch", "context", "layers_measured")),
                *_with_spread(cell["speedup"], 3),
                *_with_spread(inverse(cell["against_stored"]), 3),
                f"{share['together']:.2%}",
                f"{share['one by one']:.2%}",
            ]
        )
    return rows


def _sealing(result: Result) -> Rows:
    rows: Rows = [["shape", "rows", "tokens each", "chunks", "layers", "milliseconds", "times the floor", "spread"]]
    for cell in result["sealing"]:
        rows.append(
            [
                *(str(cell[key]) for key in ("shape", "rows", "context", "chunks", "layers_measured")),
                f"{1000 * cell['seconds']['median']:.3f}",
                *_with_spread(cell["times_floor"], 2),
            ]
        )
    return rows


def _aims(result: Result) -> Rows:
    speeds = [inverse(cell["against_stored"])["median"] for cell in result["decode"]]
    floors = [cell["times_floor"]["median"] for cell in result["sealing"]]
    shares = [
        cell["sealing_share"]["one by one"]
        for cell in result["decode"]
        if cell["context"] == SHARE_CONTEXT and result["parameters"]["pruning_ratio"] == 0.5
    ]
    rows: Rows = [["aim", "worst measured", "met"]]
    for aim, worst, met, form in (
        (
            f"at least {AGAINST_STORED:g} times the speed of the kernel over stored(n)",
            min(speeds, default=None),
            all(speed >= AGAINST_STORED for speed in speeds),
            "{:.3f}",
        ),
        (
            f"a seal within {TIMES_FLOOR:g} times its floor",
            max(floors, default=None),
            all(floor <= TIMES_FLOOR for floor in floors),
            "{:.2f}",
        ),
        (
            f"sealing at most {SEALING_SHARE:.0%} at {SHARE_CONTEXT} tokens, r = 0.5",
            max(shares, default=None),
            all(share <= SEALING_SHARE for share in shares),
            "{:.2%}",
        ),
    ):
        measured = [form.format(worst), "yes" if met else "no"] if worst is not None else ["not measured", ""]
        rows.append([aim, *measured])
    return rows


def _with_spread(spread: Spread, digits: int) -> list[str]:
    """The median, and least to greatest."""
    median, least, greatest = figures(spread, digits)
    return [median, f"{least} to {greatest}"]
