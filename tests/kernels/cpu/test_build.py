"""The compiled kernels in the cache folder: built once, built anew where the file is damaged, refused in a sentence."""

import pytest

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.kernels.cpu import build


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads the kernels as a new process does, from a cache folder of the test's own; compiled quickly, not well."""
    monkeypatch.setattr(build, "_FLAGS", ["-O0", *build._FLAGS[1:]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load_anew(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return build.load_kernel.__wrapped__().seal_chunks

    return load_anew


def test_compiled_kernels_are_used_again_and_damaged_ones_compiled_anew(load, tmp_path):
    load()
    (library,) = (tmp_path / "vllm-tokenfilter" / "kernels").iterdir()
    whole, written = library.read_bytes(), library.stat().st_mtime_ns
    load(CC="/bin/false")
    assert library.stat().st_mtime_ns == written
    for size in (0, 100, 5000, -1):
        library.unlink()  # the loaded one stays as it is
        library.write_bytes(whole[:size])
        with pytest.raises(UnsupportedError, match="CC=/bin/false cannot build"):
            load(CC="/bin/false")
        load(CC="")
        assert len(library.read_bytes()) == len(whole)


def test_a_cache_folder_that_cannot_be_written_is_refused_by_name(load):
    with pytest.raises(UnsupportedError, match=r"/proc/self/nowhere/.*set XDG_CACHE_HOME to a writable folder"):
        load(XDG_CACHE_HOME="/proc/self/nowhere")
