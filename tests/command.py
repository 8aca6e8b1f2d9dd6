"""Our command line, run in this process: importing torch and vLLM anew for every try would take minutes.

tests/serving/test_server.py also runs it as users do, in a process of its own.
"""

import contextlib
import io
import os
import sys
from subprocess import CompletedProcess
from unittest import mock

from vllm_tokenfilter.cli.app import main


def run_command(*arguments, cwd=".") -> CompletedProcess[str]:
    """Exit status and output of `vllm-tokenfilter ARGUMENTS`; the environment is as before when it returns."""
    words, out, err = [str(word) for word in arguments], io.StringIO(), io.StringIO()
    status = 0
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["vllm-tokenfilter", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
    return CompletedProcess(words, status, out.getvalue(), err.getvalue())
