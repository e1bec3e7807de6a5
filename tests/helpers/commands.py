"""Short runs and expected mistakes on the command line."""

from antransformer.cli import main
from helpers.small import SMALL_OPTIONS

TEN_STEPS = [
    "--precision=float32",
    "--batch-tokens=256",
    "--tokens=2560",
    "--eval-tokens=1024",
    "--log-every=1",
    *SMALL_OPTIONS,
]


def write_documents(folder, documents=12):
    """Create a folder of plain text files, one document each."""
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number}.txt").write_text(f"document {number}: to be or not to be, that is the question. " * 40)
    return folder


def refused(arguments, capsys):
    """Run a command that must exit with status 2 and one line on standard error; return that line."""
    status = main([str(word) for word in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.startswith("antransformer: error: ") and captured.err.count("\n") == 1
    return captured.err
