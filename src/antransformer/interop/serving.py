"""Serve a model by llama.cpp's OpenAI-compatible server on this machine."""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from antransformer.data import Tokenizer
from antransformer.errors import ConfigError, MachineError
from antransformer.extras import require
from antransformer.interop import llama_server
from antransformer.interop.export import export
from antransformer.interop.gguf_check import check_gguf
from antransformer.interop.llama_cpp import HOST
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.run_folder import run_folder_of


class Server(str):
    """Address of a running server."""

    process: "subprocess.Popen[str]"

    def wait(self) -> None:
        """Block while the server runs; raises MachineError when it ends."""
        raise MachineError(f"llama.cpp ended with status {self.process.wait()}: start it again")


def check_port(port: int) -> None:
    """Raise ConfigError if nothing can listen on a port of this machine."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be between 0 and {2**16 - 1}, got {port}")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does after it was restarted
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error


@contextlib.contextmanager
def serve_checkpoint(checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: str, port: int) -> Iterator[Server]:
    """Export a checkpoint to a temporary GGUF file and serve it; yields the address.

    Raises:
        MissingExtraError, CheckpointError, ConfigError, MachineError: as in ``export`` and ``serve_file``.
    """
    require("xllamacpp", "serve")
    check_port(port)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        export(checkpoint, tokenizer, file, dtype, format="gguf")
        with serve_file(file, port, run_folder_of(checkpoint).name) as address:
            yield address


@contextlib.contextmanager
def serve_file(file: Path, port: int, name: str | None = None) -> Iterator[Server]:
    """Serve a GGUF file under a name, by default its own; yields the address. The server ends with the context.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        ConfigError: the file is not a GGUF file or is damaged, or the port is in use.
        MachineError: llama.cpp cannot load the file.
    """
    require("xllamacpp", "serve")
    check_port(port)
    check_gguf(file)
    words = [sys.executable, "-P", "-m", llama_server.__name__, str(file), str(port), name or file.stem]
    # In a session of its own, so that Ctrl-C reaches only this process, which then stops it.
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            yield _address(server, file)
        finally:
            server.kill()


def _address(server: "subprocess.Popen[str]", file: Path) -> Server:
    """Address that a server process reports when it is ready."""
    assert server.stdout is not None
    line = server.stdout.readline()
    message: dict[str, str] = json.loads(line) if line else {}
    if "address" not in message:
        raise MachineError(message.get("error", f"llama.cpp ended with status {server.wait()} while it loaded {file}"))
    address = Server(message["address"])
    address.process = server
    return address
