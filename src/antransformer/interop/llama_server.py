"""llama.cpp's server in a process of its own: ``python -m antransformer.interop.llama_server FILE PORT NAME``.

In the process of the caller it could not be stopped during a request: its destructor waits for the client, and no
signal handler of Python runs meanwhile. The first line of the output is JSON with the address, or with an error. The
process ends when its standard input closes.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from antransformer.errors import MachineError
from antransformer.interop.llama_cpp import start_server


def main(words: Sequence[str]) -> None:
    """Serve the file until the standard input closes."""
    file, port, name = words
    output = os.dup(1)
    os.dup2(2, 1)  # nobody reads what the library may print
    try:
        server = start_server(Path(file), int(port), name=name)
        message = {"address": server.listening_address}
    except MachineError as error:
        message = {"error": str(error)}
    os.write(output, f"{json.dumps(message)}\n".encode())
    if "address" in message:
        while os.read(0, 1):
            pass
    os._exit(0)  # without the destructor


if __name__ == "__main__":
    main(sys.argv[1:])
