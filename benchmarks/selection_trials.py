"""Where and how hard to prune: many settings against dense on recall and running text, in minutes.

Uses what `vllm-tokenfilter tune` uses (vllm_tokenfilter/tuning.py): each text is read once, only its end again for
every setting. `make bench-selection` writes benchmarks/results/selection_trials.json; every trial is a row, the lost
ones too.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_tokenfilter.cli.output import print_tables, progress_bar
from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.evaluation.texts import load_text
from vllm_tokenfilter.local.models import MODEL_NAME, default_model_path
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result
from vllm_tokenfilter.local.settings_file import read_settings
from vllm_tokenfilter.reports.tables import tuning_tables
from vllm_tokenfilter.tuning.texts import make_texts
from vllm_tokenfilter.tuning.tuner import Tuner, load_model

HERE = Path(__file__).parent
OUT = HERE / "results" / "selection_trials.json"
TUNED = HERE.parent / "configs" / "smollm2-135m-tuned.yaml"


def trials(num_layers: int) -> dict[str, FilterConfig]:
    """Name -> settings; mean ratio 0.5 unless the name says otherwise."""
    tuned = read_settings(TUNED)
    whole = [index for index, ratio in enumerate(tuned.schedule.ratios) if ratio == 0]

    def spare(layers: list[int], ratio: float, chunk: int, window: int, **others: object) -> FilterConfig:
        ratios = [0.0 if index in layers else ratio for index in range(num_layers)]
        schedule = {"kind": "per_layer", "ratios": ratios}
        sizes = {"chunk_size": chunk, "recent_window": window}
        mean = round(sum(ratios) / num_layers, 4)
        return FilterConfig.parse({"pruning_ratio": mean, "schedule": schedule, **sizes, **others})

    found = {
        "uniform": {},
        "uniform, chunk and window 128": {"chunk_size": 128, "recent_window": 128},
        "uniform, window 256": {"recent_window": 256},
        "tail": {"schedule": {"kind": "tail"}},
        "linear": {"schedule": {"kind": "linear"}},
        "fusion key": {"fusion": "key"},
        "fusion value": {"fusion": "value"},
        "fusion mean": {"fusion": "mean"},
        "decay 0.98": {"anchor_decay": 0.98},
    }
    settings = {name: FilterConfig.parse({"pruning_ratio": 0.5, **others}) for name, others in found.items()}
    settings["tuned"] = tuned
    for chunk, window in ((64, 64), (64, 128), (256, 256)):
        settings[f"tuned layers, chunk {chunk}, window {window}"] = spare(whole, 0.75, chunk, window)
    for fusion in ("key", "value", "mean"):
        settings[f"tuned layers, fusion {fusion}"] = spare(whole, 0.75, 128, 128, fusion=fusion)
    settings["first ten layers whole"] = spare(list(range(10)), 0.75, 128, 128)
    settings["last ten layers whole"] = spare(list(range(num_layers - 10, num_layers)), 0.75, 128, 128)
    settings["every third layer whole"] = spare(list(range(0, num_layers, 3)), 0.75, 128, 128)
    # The best of equal mean that were found by hand before `tune`.
    settings["chunk 256, layers 15 to 19 whole"] = spare(list(range(15, 20)), 0.6, 256, 256)
    settings["chunk 256, layers 10 to 19 whole"] = spare(list(range(10, 20)), 0.75, 256, 256)
    settings["tuned layers at 0.25, others 0.625"] = FilterConfig.parse(
        {
            "pruning_ratio": 0.5,
            "chunk_size": 128,
            "recent_window": 128,
            "schedule": {
                "kind": "per_layer",
                "ratios": [0.25 if index in whole else 0.625 for index in range(num_layers)],
            },
        }
    )
    return settings


def main(
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 1500,
    questions: Annotated[int, typer.Option(min=1, help="Per kind and depth.")] = 4,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local text; see docs/evaluation.md.")] = None,
    out: Annotated[Path, typer.Option(help="Result file.")] = OUT,
) -> None:
    """Measure, print a table, write the JSON."""
    source, prose = load_text(None, data_dir)
    model, tokenizer = load_model(str(default_model_path()), "cpu")
    tuner = Tuner(model)
    texts = make_texts(tokenizer, list(tokenizer(prose, add_special_tokens=False)["input_ids"]), length, questions)
    settings = {"dense": FilterConfig.parse({"pruning_ratio": 0}), **trials(tuner.num_layers)}
    with progress_bar() as progress:
        scores = tuner.measure(texts, settings, "Trials", progress)
    result = {
        "kind": "selection",
        **provenance(),
        "model": MODEL_NAME,
        "text": source,
        "parameters": {"length": length, "trials": questions},
        "scores": [asdict(score) for score in scores],
    }
    print_tables(tuning_tables(result))
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
