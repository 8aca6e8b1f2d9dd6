"""The results page's section on a GPU, from a file of benchmarks/gpu_attention.py; nothing where there is none."""

from vllm_tokenfilter.reports.figures import Result
from vllm_tokenfilter.reports.tables import Rows, markdown

#: docs/gpu.md: what was aimed at, before anything was measured.
AGAINST_STORED, TIMES_FLOOR, SEALING_SHARE, SHARE_CONTEXT = 1.03, 2.0, 0.01, 32768


def gpu_section(result: Result) -> str:
    """Decode attention, the check against stored(n), sealing's share and its distance from the byte floor."""
    device, parameters = result["device"], result["parameters"]
    decode: Rows = [
        ["shape", "kernel", "requests", "tokens each", "layers", "speed-up", "spread", "to stored(n)", "spread",
         "sealing's share, together", "one by one"],
    ]  # fmt: skip
    for cell in result["decode"]:
        decode.append(
            [
                cell["shape"],
                cell["kernel"],
                str(cell["batch"]),
                str(cell["context"]),
                str(cell["layers_measured"]),
                f"{cell['speedup']['median']:.3f}",
                _spread(cell["speedup"], 3),
                f"{cell['against_stored']['median']:.3f}",
                _spread(cell["against_stored"], 3),
                f"{cell['sealing_share']['together']:.2%}",
                f"{cell['sealing_share']['one by one']:.2%}",
            ]
        )
    sealing: Rows = [["shape", "rows", "tokens each", "chunks", "layers", "milliseconds", "times the floor", "spread"]]
    for cell in result["sealing"]:
        sealing.append(
            [
                cell["shape"],
                *(str(cell[key]) for key in ("rows", "context", "chunks", "layers_measured")),
                f"{1000 * cell['seconds']['median']:.3f}",
                f"{cell['times_floor']['median']:.2f}",
                _spread(cell["times_floor"], 2),
            ]
        )
    notes = [
        f"- not measured: {', '.join(f'{key} {value}' for key, value in cell.items() if key != 'reason')}: "
        f"{cell['reason']}."
        for cell in result["skipped"]
    ]
    return "\n".join(
        [
            f"{device['name']}, ratio {parameters['pruning_ratio']:g}, {parameters['dtype']}, blocks of "
            f"{parameters['block_size']}, {parameters['repeats']} interleaved repeats. A step is the attention of the "
            "layers measured, as one CUDA graph; a speed-up is the kernel's time over n tokens over ours, and *to "
            "stored(n)* ours over the kernel's at stored(n). Sealing's share is of sealing and attention alone; the "
            f"floor is the bytes a seal must move at {device['copy_bytes_per_s'] / 1e9:.0f} GB/s, a plain copy's "
            "speed.\n",
            markdown(decode) + "\n" if result["decode"] else "",
            markdown(_aims(result)) + "\n",
            markdown(sealing) + "\n",
            *notes,
        ]
    )


def _aims(result: Result) -> Rows:
    rows: Rows = [["aim", "worst measured", "met"]]
    stored = [cell["against_stored"]["median"] for cell in result["decode"]]
    floors = [cell["times_floor"]["median"] for cell in result["sealing"]]
    shares = [
        cell["sealing_share"]["one by one"]
        for cell in result["decode"]
        if cell["context"] == SHARE_CONTEXT and result["parameters"]["pruning_ratio"] == 0.5
    ]
    for aim, values, limit, form in (
        (f"ours over the kernel at stored(n) at most {AGAINST_STORED:g}", stored, AGAINST_STORED, "{:.3f}"),
        (f"a seal within {TIMES_FLOOR:g} times its floor", floors, TIMES_FLOOR, "{:.2f}"),
        (f"sealing at most {SEALING_SHARE:.0%} at {SHARE_CONTEXT} tokens, r = 0.5", shares, SEALING_SHARE, "{:.2%}"),
    ):
        if values:
            rows.append([aim, form.format(max(values)), "yes" if max(values) <= limit else "no"])
        else:
            rows.append([aim, "not measured", ""])
    return rows


def _spread(values: dict[str, float], digits: int) -> str:
    return f"{values['least']:.{digits}f} to {values['greatest']:.{digits}f}"
