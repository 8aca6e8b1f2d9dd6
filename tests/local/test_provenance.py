"""What a result file says of where it came from."""

from vllm_tokenfilter.local.provenance import _command, provenance


def test_a_command_holds_no_path_of_the_machine():
    told = _command(["/home/me/.venv/app.py", "eval", "--data-dir", "/data/sets/eval", "--ratio", "0.5"])
    assert told == "vllm-tokenfilter eval --data-dir eval --ratio 0.5"


def test_machine_versions_and_time_are_there():
    found = provenance()
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0
    assert {"vllm-tokenfilter", "python"} <= set(found["versions"]) and found["time"].endswith("+00:00")
