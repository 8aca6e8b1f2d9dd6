"""Bad input to bench and eval ends in one sentence and status 2, before anything heavy starts."""

from pathlib import Path

import pytest

from tests.command import run_command
from vllm_tokenfilter.errors import EvaluationError

MODEL = ["--model", "nowhere"]
CONFIG = str(Path(__file__).parents[2] / "configs" / "smollm2-135m.yaml")
SAME_NAME = ["--config", CONFIG, "--config", CONFIG]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["eval", *MODEL, "--method", "magic"], "method=magic is unknown; use one of variance_aware"),
        (["eval", *MODEL, "--metric", "taste"], "metric=taste is unknown"),
        (["eval", *MODEL, "--ratio", "1.5"], "pruning_ratio=1.5"),
        (["eval", *MODEL, "--window", "8"], "recent_window=8 is below chunk_size=64"),
        (["eval", *MODEL, "--depth", "2"], "depth=2.0 must be from 0 to 1"),
        (["eval", *MODEL, "--length", "1"], "length=1 is too short"),
        (["eval", *MODEL, "--data-dir", "/nowhere"], "data-dir=/nowhere must be a folder that exists"),
        (["eval", *MODEL, "--text", "/nowhere.txt"], "text=/nowhere.txt cannot be read"),
        (["eval", *MODEL, "--text", "wikitext2"], "text=wikitext2 is not in --data-dir and HF_HUB_OFFLINE=1"),
        (["eval", *MODEL, "--json", "/dev/null/x.json"], "json=/dev/null/x.json cannot be written"),
        (["eval", *MODEL, "--html", "/nowhere/x.html"], "html=/nowhere/x.html cannot be written"),
        (
            ["eval", *MODEL, "--metric", "tasks", "--task", "chess_trivia"],
            "task=chess_trivia must be a task",
        ),
        (["eval", *MODEL, "--metric", "tasks", "--task", "boolq"], "task=boolq has no data"),
        (["eval", *MODEL, *SAME_NAME], "has the same name as another file, smollm2-135m; rename one of them"),
        (["bench", "--url", "http://127.0.0.1:9", "--quick"], "url=http://127.0.0.1:9 does not answer"),
        (["bench", "--url", "no url", "--quick"], "url=no url does not answer"),
        (["bench", *MODEL, "--ratio", "-1"], "pruning_ratio=-1"),
        (["bench", *MODEL, "--context", "0"], "context=0 must be at least 1"),
        (["bench", *MODEL, "--concurrency", "0"], "concurrency=0 must be at least 1"),
        (["bench", *MODEL, "--json", "/dev/null/x.json"], "json=/dev/null/x.json cannot be written"),
        (["bench", *MODEL, "--html", "/nowhere/x.html"], "html=/nowhere/x.html cannot be written"),
        (
            ["inspect", "--text", "/nowhere.txt", "--html", "x.html"],
            "text=/nowhere.txt must be a UTF-8 file",
        ),
        (["inspect", "--text", __file__, "--html", "/nowhere/x.html"], "html=/nowhere/x.html cannot be written"),
        (["inspect", "--text", __file__, "--html", "x.html", "--ratio", "0"], "pruning_ratio=0 removes nothing"),
        (
            ["inspect", "--text", __file__, "--html", "x.html", "--window", "8"],
            "recent_window=8 is below chunk_size=64",
        ),
        (["inspect", *MODEL, "--text", __file__, "--html", "x.html"], "model=nowhere cannot be read"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, arguments, sentence):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-tokenfilter: ") and sentence in last


@pytest.mark.parametrize(
    "command",
    [
        ["serve", *MODEL],
        ["serve"],
        ["bench", *MODEL, "--quick"],
        ["eval", *MODEL],
        ["verify", *MODEL],
        ["plan", "--model-config", "nowhere", "--context", "100"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("content", [b"port: 8000 # gr\xfc\xdfe", "port: 8000".encode("utf-16"), b"port: [", b""])
def test_a_settings_file_that_cannot_be_read_ends_in_one_sentence(tmp_path, command, content):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    (tmp_path / "config.yaml").write_bytes(content)
    done = run_command(*command, "--config", "config.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("vllm-tokenfilter: Token Filtering configuration refused: config=config.yaml ")
    )


def test_a_result_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "eval.json").write_text('{"precious": 1}')
    done = run_command("eval", *MODEL, cwd=tmp_path)
    assert done.returncode == 2 and "must be a result file of the kind evaluation" in done.stderr
    assert (tmp_path / "eval.json").read_text() == '{"precious": 1}'


def test_what_the_user_names_wins_over_a_quick_look(monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from vllm_tokenfilter.cli.measure import evaluate
    from vllm_tokenfilter.evaluation import plan

    def planned(**flags):
        asked = {}

        def catch(**given):
            asked.update(given)
            raise EvaluationError(["planned"])

        monkeypatch.setattr(plan, "EvaluationPlan", catch)
        with pytest.raises(EvaluationError, match="planned"):
            evaluate(model="nowhere", quick=True, **flags)
        return asked

    quick = planned()
    assert (quick["windows"], quick["trials"], quick["ratios"]) == (4, 16, [0.5])
    named = planned(windows=0, trials=100, ratio=[0.25], recall_length=[1500], depth=[0.1], length=[2048])
    assert (named["windows"], named["trials"], named["ratios"]) == (0, 100, [0.25])
    assert (named["recall_lengths"], named["depths"], named["lengths"]) == ([1500], [0.1], [2048])
