"""Compiles the C kernels for this machine once and loads them: a shared library in the user's cache folder.

Compiled on the machine it runs on, because it is only as fast as the processor's vector instructions. It is linked
without an OpenMP library of its own: the one that PyTorch has loaded serves it too, so that no second pool of threads
competes for the cores.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.local.paths import cache_folder

SOURCES = [Path(__file__).with_name(name) for name in ("seal.c", "skip.c", "substitutes.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("cache.h", "skip.h")]

# Sums may be reordered to use vector registers; NaN and infinity keep their meaning.
_REORDERED = "-fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -freciprocal-math"
_FLAGS = ["-O3", "-std=c11", "-fPIC", "-fopenmp", *_REORDERED.split(), "-ffp-contract=fast"]


@functools.cache
def load_kernel() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        UnsupportedError: there is no C compiler, it refuses the source, or the cache folder cannot be used.
    """
    import torch  # noqa: F401  (brings the OpenMP library whose symbols the kernel needs)

    library = cache_folder() / "kernels" / f"kernels-{_fingerprint()}.so"
    try:
        if not _is_whole(library):
            _compile(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnsupportedError(
            f"the CPU kernels are compiled into {library.parent}, which cannot be used ({error}); "
            "set XDG_CACHE_HOME to a writable folder."
        ) from error


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise UnsupportedError("CC: no C compiler (cc, gcc, clang) was found; install one or set CC to its path.")


def _fingerprint() -> str:
    """Changes with the source, the flags and the processor, so that a shared home folder serves many machines."""
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    parts = (*(path.read_text() for path in (*SOURCES, *_HEADERS)), " ".join(_FLAGS), platform.machine(), processor)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_whole(library: Path) -> bool:
    """Whether the file ends with the digest of the rest: to load one that was cut short may end the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _compile(library: Path) -> None:
    compiler = _compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled = Path(folder) / "kernels.so"
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        compile_each = [
            [compiler, *_FLAGS, native, "-c", str(source), "-o", target]
            for source, target in zip(SOURCES, objects, strict=True)
        ]
        for command in (*compile_each, [compiler, "-shared", *objects, "-o", str(compiled), "-lm"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedError(
                    f"CC={compiler} cannot build the CPU kernel ({done.stderr.strip()[-300:]}); set CC to another one."
                )
        with compiled.open("ab") as file:
            file.write(hashlib.sha256(compiled.read_bytes()).digest())
        # Several workers may build at once; each replaces the whole file.
        compiled.replace(library)
