"""How fast decoding is when attention is skipped, or layers are pruned unevenly: stock vLLM and ours, interleaved.

Measured as attention_speed.py does, but compiled, which is vLLM's default: what is not attention takes less then. Stock
at half and at a quarter of the tokens says what could be gained at most, if deciding and sealing cost nothing.

A second model has the geometry of Phi-1.5's layers (32 heads without grouping, hidden size 2048), four of them, with
random weights: there reading the cache is most of a step, as in the models people serve; in SmolLM2-135M it is half.
"Blocks of 128" are stock vLLM's own on CPU; ours are smaller, so that prefix caching can share sealed chunks.
`make bench-skipping` writes benchmarks/results/skipping_speed.json.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from attention_speed import COMMON, ENGINES, LONG, NEW_TOKENS, REQUESTS, measure
from engines import interleave, ours
from rich.console import Console
from rich.table import Table

from vllm_tokenfilter.local.models import default_model_path
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result
from vllm_tokenfilter.local.settings_file import read_config_file

OUT = Path(__file__).parent / "results" / "skipping_speed.json"
#: Prefix caching needs blocks that a chunk's kept tokens fill, 32 on CPU; vLLM's kernel reads large blocks faster.
LARGE_BLOCKS = {"block_size": 128}
TUNED = Path(__file__).parents[1] / "configs" / "smollm2-135m-tuned.yaml"
SKIPPING = {
    "skipping 0.5, none": ours(0, attention_skipping={"ratio": 0.5, "substitute": "none"}),
    "skipping 0.5, window, and r=0.5": ours(0.5, attention_skipping={"ratio": 0.5, "substitute": "window"}),
}
SMOLLM2, WIDE = "SmolLM2-135M-Instruct", "4 layers as Phi-1.5's, random weights"
#: model -> engines
ENGINES_OF: dict[str, dict[str, Any]] = {
    SMOLLM2: {
        "stock": ENGINES["stock"],
        **SKIPPING,
        "skipping 0.5, window, and r=0.5, blocks of 128": {
            **SKIPPING["skipping 0.5, window, and r=0.5"],
            **LARGE_BLOCKS,
        },
        "r=0.5": ENGINES["r=0.5"],
        "r=0.5, blocks of 128": {**ENGINES["r=0.5"], **LARGE_BLOCKS},
        "tuned, mean r=0.5": {
            "attention_backend": "TOKEN_FILTERING",
            "additional_config": read_config_file(TUNED)["additional-config"],
        },
    },
    WIDE: {"stock": ENGINES["stock"], **SKIPPING},
}
#: Stock at fewer tokens, and what it bounds.
BOUNDS = {"stock at half the tokens": LONG // 2, "stock at a quarter of the tokens": LONG // 4}
KV_BYTES = {SMOLLM2: 1 << 30, WIDE: 3 << 29}


def make_wide_model(folder: Path) -> str:
    """Write the second model, which takes SmolLM2's tokenizer, and return its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(default_model_path()).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return str(folder)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed-ups over stock inside each repeat, those that fewer tokens give stock, and the share of sealing."""
    speedups = {
        name: spread([s["stock"]["time_between_tokens_s"] / s[name]["time_between_tokens_s"] for s in samples])
        for name in samples[0]
        if name != "stock"
    }
    return {
        "speedups": {name: values for name, values in speedups.items() if name not in BOUNDS},
        "bounds": {name: values for name, values in speedups.items() if name in BOUNDS},
        "stock_time_between_tokens_s": spread([s["stock"]["time_between_tokens_s"] for s in samples]),
        "seal_share": {
            name: statistics.median(s[name]["seal_share"] for s in samples) for name in speedups if name not in BOUNDS
        },
    }


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats.")] = 5,
    eager: Annotated[bool, typer.Option(help="Compile nothing, as attention_speed.py.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Result file.")] = OUT,
) -> None:
    """Measure, print a table, write the JSON."""
    console = Console()
    models: dict[str, Any] = {}
    for name in model or ENGINES_OF:
        common = {**COMMON, "enforce_eager": eager, "kv_cache_memory_bytes": KV_BYTES[name]}
        engines = {engine: {**common, **arguments} for engine, arguments in ENGINES_OF[name].items()}
        cases = {engine: (engine, LONG) for engine in engines}
        cases |= {bound: ("stock", length) for bound, length in BOUNDS.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = make_wide_model(Path(folder)) if name == WIDE else None
            samples = interleave(engines, cases, measure, repeats, console, path)
        models[name] = {"summary": summarise(samples), "samples": samples}
        table = Table(f"{name}: speed-up over stock", "median", "least", "greatest")
        for row, values in {**models[name]["summary"]["speedups"], **models[name]["summary"]["bounds"]}.items():
            table.add_row(row, *(f"{values[key]:.3f}" for key in ("median", "least", "greatest")))
        console.print(table)
    result = {
        "benchmark": "skipping_speed",
        **provenance(),
        "parameters": {
            "requests": REQUESTS,
            "tokens": LONG,
            "new_tokens": NEW_TOKENS,
            "kv_cache_bytes": {name: KV_BYTES[name] for name in models},
            "repeats": repeats,
            "eager": eager,
        },
        "models": models,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, result)
    console.print(f"Written: {out}")


if __name__ == "__main__":
    typer.run(main)
