"""A file, flags and `--pruning-ratio`, however they are spelled, reach vLLM's parser as the user means them."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration.server import arguments
from vllm_tokenfilter.integration.server.arguments import read, server_arguments, server_parser, words_of

MODEL = "some/model"
OURS = "additional-config: {token_filtering: {pruning_ratio: 0.25}}\n"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(arguments, "default_model_path", lambda: tmp_path / "embedded")


@pytest.fixture
def parse(tmp_path):
    """What vLLM's server gets of these flags and this file."""

    def parse(*flags, file=None, ratio=None):
        path = None
        if file is not None:
            path = tmp_path / "config.yaml"
            path.write_bytes(file if isinstance(file, bytes) else file.encode())
        return server_parser().parse_args(server_arguments([*flags, *([f"--config={path}"] if path else [])], ratio))

    return parse


@pytest.fixture
def settings(parse):
    return lambda *flags, **given: parse(*flags, **given).additional_config["token_filtering"]


@pytest.mark.parametrize(
    "file, value",
    [
        ("enable-prefix-caching: false", False),
        ("enable_prefix_caching: false", False),
        ("enable-prefix-caching: no", False),
        ("enable-prefix-cachin: false", False),
        ("no-enable-prefix-caching: true", False),
        ("no_enable_prefix_caching: true", False),
        ("enable_prefix_caching: true", True),
        ("port: 8001", None),
    ],
)
def test_a_switch_in_a_file_reaches_vllm(parse, file, value):
    assert parse(MODEL, file=file).enable_prefix_caching is value
    assert parse(MODEL, "--enable-prefix-caching", file=file).enable_prefix_caching is True
    assert parse(MODEL, "--no-enable-prefix-caching", file=file).enable_prefix_caching is False


@pytest.mark.parametrize(
    "file",
    [
        OURS,
        "additional_config: {token_filtering: {pruning_ratio: 0.25}}",
        "additional-config: {token-filtering: {pruning-ratio: 0.25}}",
        """additional-config: '{"token_filtering": {"pruning_ratio": 0.25}}'""",
        "additional-config.token_filtering.pruning_ratio: 0.25",
        "additional_config.token-filtering: {pruning-ratio: 0.25}",
        "additional-conf: {token_filtering: {pruning_ratio: 0.25}}",
        "additional-config: {token_filtering: {<<: {pruning_ratio: 0.25}}}",
        "\ufeff" + OURS,
        "%YAML 1.1\n---\n" + OURS,
    ],
)
def test_the_settings_of_a_file_are_found_in_every_spelling(settings, file):
    assert settings(file=file) == {"pruning_ratio": 0.25}
    assert settings("--pruning_ratio=0.75", file=file) == settings(ratio=0.75, file=file) == {"pruning_ratio": 0.75}


def test_flags_win_over_the_file_and_the_ratio_over_both_key_by_key(settings):
    file = "additional-config: {token_filtering: {pruning_ratio: 0.75, chunk_size: 64, dense_layers: [1]}, other: 1}"
    dotted = ["--additional-config.token_filtering.chunk_size", "128"]
    dotted += ["--additional-config.token-filtering.recent-window=128"]
    assert settings(*dotted, ratio=0.25) == {"pruning_ratio": 0.25, "chunk_size": 128, "recent_window": 128}
    mixed = {"pruning_ratio": 0.75, "chunk_size": 128, "recent_window": 128, "dense_layers": [1]}
    assert settings(*dotted, file=file) == mixed
    twice = ["--additional-config", '{"token_filtering": {"pruning_ratio": 0.5}}', "--additional_config", "{}"]
    assert settings(*twice, *dotted, file=file) == {**mixed, "pruning_ratio": 0.5}
    json_flag = ["--additional-c", '{"token_filtering": {"recent_window": 256}}']
    assert settings(*json_flag, file=file, ratio=0.5) == {
        "pruning_ratio": 0.5,
        "chunk_size": 64,
        "recent_window": 256,
        "dense_layers": [1],
    }


def test_what_others_keep_in_additional_config_stays(parse):
    file = "additional-config: {other: {a: 1, schedule: x}}"
    kept = parse(MODEL, "--additional-config.other.b", "2", file=file).additional_config
    assert kept == {"other": {"a": 1, "b": 2, "schedule": "x"}, "token_filtering": {}}


def test_the_embedded_filter_is_served_only_where_nothing_says_how_to_filter(settings):
    for nothing in (
        {},
        {"file": "port: 8001"},
        {"file": "additional-config:"},
        {"file": "additional-config: {other: 1}"},
    ):
        assert settings(**nothing) == arguments.EMBEDDED_FILTER
    assert settings(file="additional-config: {token_filtering: }") == {}
    assert settings("--additional-config", '{"token_filtering": null}') == {}
    assert settings(MODEL) == settings("--model", MODEL) == settings(file=f"model: {MODEL}") == {}


@pytest.mark.parametrize(
    "compiled",
    [
        ["-O3"],
        ["-O", "3"],
        ["-O=3"],
        ["--optimization-level", "3"],
        ["--optimization_level=3"],
        ["--compilation-config.mode", "3"],
        ["-cc.mode=3"],
        ["-cc", '{"mode": 3}'],
        ["--compilation-config.cudagraph_mode=NONE"],
        ["--cudagraph-capture-sizes", "1", "2"],
        ["--max-cudagraph-capture-size", "8"],
        ["--no-enforce-eager"],
        ["--no_enforce_eag"],
    ],
)
def test_the_embedded_model_is_compiled_as_the_user_chose(parse, compiled):
    assert parse().enforce_eager is True
    assert parse(*compiled).enforce_eager is False


@pytest.mark.parametrize("file", ["optimization-level: 3", "enforce_eager: false", "compilation-config: {mode: 3}"])
def test_a_file_chooses_compilation_too(parse, file):
    assert parse(file=file).enforce_eager is False


def test_the_embedded_model_keeps_what_the_user_gave(parse):
    assert (parse().host, parse().max_model_len, parse().kv_cache_memory_bytes) == ("127.0.0.1", 8192, 2 << 30)
    assert parse("some/model").host is None, "as vLLM"
    assert parse("--max_model_len", "1k").max_model_len == 1000
    assert parse(file="max_model_len: 4096\nserved-model-name: [a, b]").served_model_name == ["a", "b"]
    assert parse("--kv-cache-mem", "1G").kv_cache_memory_bytes == 1 << 30
    # vLLM would leave the user's share of the memory without effect beside a size in bytes.
    assert parse("--gpu-memory-utilization=0.5").kv_cache_memory_bytes is None
    assert parse("--num-gpu-blocks-override", "10").kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    "flags, file",
    [
        ([], None),
        (["--attention-backend", "TOKEN_FILTERING"], None),
        (["--attention_backend=token_filtering"], None),
        (["--attention-backend", "auto"], None),
        (["--attention-config.backend", "TOKEN_FILTERING"], None),
        (["-ac.backend=TOKEN_FILTERING"], None),
        (["-ac", '{"backend": "TOKEN_FILTERING"}'], None),
        (["-ac", '{"backend": null}'], None),
        (["-ac", '{"flash_attn_version": 3}'], "attention-backend: TOKEN_FILTERING"),
        (["--attention-config.backend", "TOKEN_FILTERING"], "attention-backend: FLASH_ATTN"),
        (["--attention-backend", "TOKEN_FILTERING"], "attention-config: {backend: FLASH_ATTN}"),
        (["--attention-config.flash_attn_version", "3"], "attention-config.backend: TOKEN_FILTERING"),
        ([], "attention-backend: CUSTOM"),
        ([], "attention-backend: null"),
    ],
)
def test_the_backend_is_named_once(parse, flags, file):
    parsed = parse(MODEL, *flags, file=file)
    named = [name for name in (parsed.attention_backend, parsed.attention_config.backend) if name is not None]
    assert len(named) == 1 and arguments.registration.is_ours(named[0])
    if "flash_attn_version" in " ".join(flags):
        assert parsed.attention_config.flash_attn_version == 3


def test_what_stands_beside_a_backend_that_is_not_taken_is_kept(parse):
    file = "attention-config: {backend: FLASH_ATTN, flash_attn_version: 3}"
    parsed = parse(MODEL, "--attention-backend", "TOKEN_FILTERING", file=file)
    assert (parsed.attention_config.backend, parsed.attention_config.flash_attn_version) == (None, 3)


@pytest.mark.parametrize(
    "flags, file, sentence",
    [
        # files
        ([], "port: 8000\nk\xe4se: 1".encode("latin-1"), "config.yaml cannot be read ('utf-8' codec"),
        ([], OURS.encode("utf-16"), "cannot be read"),
        ([], OURS.encode("utf-16-le"), "cannot be read"),
        ([], "", "holds no settings"),
        ([], "# nothing", "holds no settings"),
        ([], "- port", "holds no settings"),
        ([], "port:\t{\n\t8001", "cannot be read"),
        ([], "a: 1\n---\nb: 2", "cannot be read"),
        ([], "port: !!python/object:os.system {}", "cannot be read"),
        ([], "revision: 2024-13-45", "cannot be read"),
        ([], "[" * 5000, "cannot be read"),
        ([], "hf-overrides: &a {a: *a}", "cannot be read (Circular reference"),
        ([], "--port: 8000", "unrecognized arguments: ----port=8000"),
        ([], "1: 2", "unrecognized arguments: --1=2"),
        ([], "prot: 8000", "unrecognized arguments: --prot=8000"),
        ([], "prot: false", "unrecognized arguments: --no-prot"),
        ([], "no-enable-prefix-caching: false", "unrecognized arguments: --no-no-enable-prefix-caching"),
        ([], "model_tag: x", "unrecognized arguments: --model-tag=x"),
        ([], "dtype: true", "argument --dtype: expected one argument"),
        ([], "headless: [a]", "headless=['a'] must be one value, not a list"),
        ([], "port: [8000, 8001]", "port=[8000, 8001] must be one value, not a list"),
        ([], "max-model-l: [8000, 8001]", "max-model-l=[8000, 8001] must be one value, not a list"),
        ([], "enable-prefix-caching: 'false'", "argument --enable-prefix-caching/"),
        ([], "config: other.yaml", "config is given twice (other.yaml, "),
        ([], "pruning-ratio: 1.25", "pruning_ratio=1.25 is refused"),
        ([], "token_filtering: {pruning_ratio: 0.25}", "unrecognized arguments: --token-filtering"),
        ([], "additional-config: []", "additional-config=[] must be a mapping"),
        ([], "additional-config: false", "additional-config=False must be a mapping"),
        ([], "additional-config: '{'", "additional-config={ must be a mapping"),
        # our keys
        ([], "additional-config: {tokenfiltering: {}}", "additional_config.tokenfiltering is not a key"),
        ([], "additional-config: {Token_Filtering: {}}", "additional_config.Token_Filtering is not a key"),
        ([], "additional-config: {vllm_tokenfilter: {}}", "additional_config.vllm_tokenfilter is not a key"),
        ([], "additional-config: {pruning-ratio: 0.25}", "additional_config.pruning-ratio has no effect there"),
        ([], "additional-config: {token_filtering: 0.25}", "token_filtering=0.25 must be a mapping"),
        ([], "a b: 1", "unrecognized arguments: --a b=1"),
        ([], "additional-config: {token_filtering: {ratio: 0.25}}", "ratio=0.25 is not a setting"),
        ([], "additional-config: {token_filtering: {pruning_ratio: true}}", "pruning_ratio=True is refused"),
        ([], "additional-config: {token_filtering: {pruning_ratio: '0.25'}}", "pruning_ratio='0.25' is refused"),
        ([], "additional-config: {token_filtering: {pruning_ratio: null}}", "pruning_ratio=None is refused"),
        ([], "additional-config: {token_filtering: {pruning_ratio: .nan}}", "pruning_ratio=nan is refused"),
        ([], "additional-config: {token_filtering: {pruning_ratio: .inf}}", "pruning_ratio=inf is refused"),
        # flags
        (["--pruning_ratio", "half"], None, "argument --pruning-ratio: invalid float value: 'half'"),
        (["--pruning_ratio", "nan"], None, "pruning_ratio=nan is refused"),
        (["--pruning_ratio=-0.5"], None, "pruning_ratio=-0.5 is refused"),
        (["--pruning-ratio", "-0.5"], None, "pruning_ratio=-0.5 is refused"),
        (["--pruning-ratio", "-.5", "--port", "8001"], None, "pruning_ratio=-0.5 is refused"),
        (["--pruning_ratio", "1e-9"], None, "pruning_ratio=1e-09 removes no token"),
        (["--additional-config", "x"], None, "additional-config=x must be a mapping"),
        (["--additional-config", "[1]"], None, "additional-config=[1] must be a mapping"),
        (["--additional-config.token_filtering", "0.5"], None, "token_filtering=0.5 must be a mapping"),
        (["--additional-config.token_filtering.pruning_ratio"], None, "a flag with a dot in its name has no value"),
        (["--max-model"], None, "argument --max-model-len: expected one argument"),
        (["--max"], None, "ambiguous option: --max could match"),
        (["a", "b"], None, "unrecognized arguments: b"),
        (["a", "--model", "b"], None, "model is given twice"),
        (["--config", "a.yaml", "--config=b.yaml"], None, "config is given twice (a.yaml, b.yaml)"),
        (["--config=a.yaml"], OURS, "config is given twice"),
        (["--attention-backend", "CPU_ATTN"], None, "attention-backend=CPU_ATTN does not filter"),
        (["--attention-backend", "NONSENSE"], None, "attention-backend=NONSENSE does not filter"),
        (["-ac.backend=CPU_ATTN"], OURS, "attention-backend=CPU_ATTN does not filter"),
        (["-ac.backend=CPU_ATTN", "--attention-backend=CUSTOM"], None, "attention-backend=CPU_ATTN does not filter"),
    ],
)
def test_what_cannot_be_understood_is_refused_in_a_sentence_that_names_it(parse, flags, file, sentence):
    with pytest.raises(ConfigError) as refused:
        parse(*flags, file=file)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_or_nothing_as_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(ConfigError, match=f"config={path} cannot be read"):
            server_arguments([f"--config={path}"], None)


def test_the_model_is_taken_from_the_first_word_before_the_file(parse):
    file = "model: from/file\nserved-model-name: [a, b]"
    assert parse(file=file).model == "from/file"
    parsed = parse("from/flags", "--port", "8001", file=file)
    assert (parsed.model_tag, parsed.served_model_name, parsed.port) == ("from/flags", ["a", "b"], 8001)
    assert parse("--model", "from/flags", file=file).model == "from/flags"


@pytest.mark.parametrize("plugins, allowed", [("token_filtering", True), ("a, token_filtering", False), ("", False)])
def test_a_list_of_plugins_without_ours_is_refused(monkeypatch, parse, plugins, allowed):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    if allowed:
        parse(MODEL)
    else:
        with pytest.raises(ConfigError, match="without spaces around commas"):
            parse(MODEL)


@pytest.mark.parametrize("given, offline", [(None, "1"), ("0", "0"), ("1", "1")])
def test_the_embedded_model_asks_no_hub_unless_the_user_says_so(monkeypatch, parse, given, offline):
    import os

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", given or "")
    if given is None:
        del os.environ["HF_HUB_OFFLINE"]
    parse()
    assert os.environ["HF_HUB_OFFLINE"] == offline
    assert constants.HF_HUB_OFFLINE is (given is None)


@pytest.mark.parametrize("flags, seconds", [([], 60), (["--shutdown-timeout", "5"], 5), (["--shutdown_timeout=0"], 0)])
def test_answers_in_flight_get_a_minute_to_finish_unless_the_user_says_otherwise(parse, flags, seconds):
    assert parse(*flags).shutdown_timeout == seconds


def test_the_baseline_of_a_benchmark_gets_the_same_without_ours(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("attention-backend: TOKEN_FILTERING\nenable-prefix-caching: false\n" + OURS)
    flags = ["--model", MODEL, "--config", str(path), "--additional-config.other", "1", "-O3"]
    parser = server_parser()
    stock = parser.parse_args(words_of(read(flags)))
    ours = parser.parse_args(server_arguments(flags, 0.75))
    assert ours.additional_config == {"other": 1, "token_filtering": {"pruning_ratio": 0.75}}
    assert (stock.attention_backend, stock.additional_config) == (None, {})
    for parsed in (stock, ours):
        assert (parsed.model, parsed.enable_prefix_caching, parsed.optimization_level) == (MODEL, False, "3")
    own = [f"--{name}={kind(0.5)}" for name, kind in arguments.OUR_FLAGS.items()]
    assert words_of(read([MODEL, *own])) == [MODEL], "vLLM does not know them"
    assert words_of(read(["-ac", '{"backend": "CUSTOM"}'])) == ["--attention-config", "{}"]


def test_the_command_runs_vllms_own_serve_with_what_it_settled(monkeypatch, tmp_path):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from vllm_tokenfilter.cli.serve import run

    served = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(served.append))
    monkeypatch.setattr(arguments.os, "environ", dict(arguments.os.environ))
    path = tmp_path / "config.yaml"
    path.write_text("enable-prefix-caching: false\n" + OURS)
    run([MODEL, "--port", "8001", "--log-level", "DEBUG"], [str(path)], 0.75)
    (parsed,) = served
    assert (parsed.model_tag, parsed.port, parsed.enable_prefix_caching) == (MODEL, 8001, False)
    assert parsed.additional_config == {"token_filtering": {"pruning_ratio": 0.75}}
    assert parsed.logging_config.log_level == "DEBUG"
    assert arguments.os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "token_filtering_http" in arguments.os.environ["VLLM_PLUGINS"].split(",")
    for flags, sentence in (
        ([MODEL, "--enable-auto-tool-choice"], "--enable-auto-tool-choice requires --tool-call-parser"),
        ([MODEL, "--attention-config.mla_prefill_backend", "NOPE"], "Unknown MLA prefill backend: 'NOPE'"),
        ([MODEL, "--port", "http"], "argument --port: invalid int value: 'http'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run(flags, [], None)
    with pytest.raises(ConfigError, match="config is given twice"):
        run([MODEL], ["a.yaml", "b.yaml"], None)
