"""Commands of the toolkit in forks of the test's process, which has imported everything: that is most of the time of a
short command. What they print, their exit code, their folder and environment are those of a process of their own."""

from __future__ import annotations

import atexit
import io
import multiprocessing.util
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

ROOT = Path(__file__).resolve().parents[1]


def command(
    *words: str, folder: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python <words>`: a script, or -m and a module, and its arguments."""
    environment = {"OMP_NUM_THREADS": "1", **environment}
    if torch.get_num_threads() > 1:  # a process with a pool of threads must not be forked
        env = {**os.environ, **environment}
        line = [sys.executable, *words]
        return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    return forked(_python, *words, folder=folder, timeout=timeout, **environment)


def torchrun(function: Callable[..., Any], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`launch` in a process of its own, which prints torchrun's report."""
    torch.set_num_threads(1)
    return forked(launch, function, arguments, OMP_NUM_THREADS="1")


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], options: tuple[str, ...] = ()) -> None:
    """torchrun's agent, with a function in two forked processes in place of a script."""
    endpoint = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")  # as --standalone does
    options = ("--nproc-per-node=2", "--start-method=fork", *endpoint, *options, "function")
    config, _, _ = config_from_args(get_args_parser().parse_args(options))
    elastic_launch(config, function)(*arguments)


def forked(
    function: Callable[..., Any], *arguments: Any, folder: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            os._exit(_child(function, arguments, folder, environment, out.fileno(), err.fileno()))
        end = time.monotonic() + timeout
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired([function.__name__, *map(str, arguments)], timeout)
            time.sleep(0.01)
        texts = [os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0).decode() for f in (out, err)]
        return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(ended[1]), *texts)


def _child(function: Any, arguments: Any, folder: Path, environment: dict[str, str], out: int, err: int) -> int:
    """Become a fresh process as far as a command can tell, and run the function; its exit code."""
    atexit._clear()  # the test's own
    atexit.register(multiprocessing.util._exit_function)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    files = [os.fdopen(number, "wb", closefd=False) for number in (1, 2)]
    sys.stdout, sys.stderr = (io.TextIOWrapper(file, line_buffering=True) for file in files)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.update(environment)
    os.chdir(folder)
    GlobalHydra.instance().clear()
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _python(*words: str) -> None:
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
