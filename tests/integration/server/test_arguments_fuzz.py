"""Whatever a settings file holds is understood or refused by name: never a traceback, never a silent default."""

import json
import string

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration.server import arguments
from vllm_tokenfilter.integration.server.arguments import server_arguments, server_parser

SETTINGS = {
    "pruning_ratio": 0.25,
    "chunk_size": 128,
    "recent_window": 256,
    "sink_tokens": 8,
    "fusion": "mean",
    "dense_layers": [1, 2],
    "first_layer": 1,
    "random_seed": 7,
}
VALUES = [True, False, None, "", "x", "0.25", "a b", "-1", -1, 0, 0.25, 1.5, 3, 1 << 40, float("nan"), float("inf")]
VALUES += [[], [1], ["a", "b"], {}, {"a": 1}, {"a": {"b": [1]}}]


def spellings(name):
    return st.tuples(*(st.sampled_from("-_") if letter == "_" else st.just(letter) for letter in name)).map("".join)


OURS = st.dictionaries(st.sampled_from(sorted(SETTINGS)), st.none()).map(
    lambda chosen: {name: SETTINGS[name] for name in chosen}
)
OPTIONS = [
    name
    for action in server_parser()._actions
    for flag in action.option_strings
    if (name := flag.removeprefix("--")) != flag and name not in ("help", "config")
]
KEYS = st.sampled_from(OPTIONS) | st.text(string.ascii_letters + "-_. =", max_size=12)
OTHERS = st.dictionaries(KEYS, st.sampled_from(VALUES), max_size=4)


@st.composite
def files(draw):
    """A file with our settings in some spelling, what they are, and other keys, which may be nonsense."""
    ours = draw(OURS)
    inner = {draw(spellings(name)): value for name, value in ours.items()}
    key, outer = draw(spellings("token_filtering")), draw(spellings("additional_config"))
    form = draw(st.sampled_from(["mapping", "json", "dotted", "dotted key"]))
    if form == "mapping":
        mine = {outer: {key: inner}}
    elif form == "json":
        mine = {outer: json.dumps({key: inner})}
    elif form == "dotted":
        mine = {f"{outer}.{key}": inner}
    else:
        mine = {f"{outer}.{key}.{name}": value for name, value in inner.items()} or {outer: {key: {}}}
    others = draw(OTHERS)
    items = draw(st.permutations([*mine.items(), *others.items()]))
    return yaml.safe_dump(dict(items), sort_keys=False).encode(), ours, others


def settle(path, content):
    path.write_bytes(content)
    try:
        return server_arguments(["--model", "some/model", f"--config={path}"], None)
    except ConfigError as refused:
        return str(refused)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


def check_written(path, given):
    content, ours, others = given
    answer = settle(path, content)
    if isinstance(answer, str):
        assert "\n" not in answer
        named = [" ".join(str(key).replace("_", "-").partition(".")[0].partition("=")[0].split()) for key in others]
        # A sentence names the setting it refuses: a key of the file, or one of our settings.
        assert any(name in answer.replace("_", "-") for name in [*named, *(n.replace("_", "-") for n in ours)]), answer
        return
    # Nothing else in the file says how to filter, so what was written is what is served.
    settings = json.loads(answer[answer.index("--additional-config") + 1])["token_filtering"]
    assert FilterConfig.parse(settings) == FilterConfig.parse(ours)


def check_bytes(path, content):
    answer = settle(path, content)
    if isinstance(answer, str):
        assert any(name in answer for name in ("config=", "additional", "token_filtering", "is not a setting")), answer
    elif not any(word in content.lower() for word in (b"token", b"ratio")):
        settings = json.loads(answer[answer.index("--additional-config") + 1])["token_filtering"]
        assert settings == {}


BEGINNINGS = st.sampled_from([b"", b"port: 8001\n", b"additional-config:\n  token_filtering:\n    "])
BYTES = st.tuples(
    BEGINNINGS,
    st.binary(max_size=100)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text("{}[]:,-&*!|>'\"%@`#? \n\tab1.~<=", max_size=60).map(str.encode),
).map(b"".join)


def run(check, strategy, path, examples):
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategy)
    def every(given):
        check(path, given)

    every()


@pytest.mark.parametrize("examples", [150, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check, strategy", [(check_written, files()), (check_bytes, BYTES)], ids=["written", "bytes"])
def test_a_file_is_understood_or_refused_by_name(path, monkeypatch, check, strategy, examples):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(arguments, "default_model_path", lambda: path)
    run(check, strategy, path, examples)
