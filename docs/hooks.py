"""Build hooks of the documentation site: pages of the commands, files outside docs/, and examples in docstrings."""

import argparse
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from antransformer.cli import VERBS, make_parser

ROOT = Path(__file__).parent.parent
LINKED = ("examples/launch/slurm.sbatch", "examples/launch/kubernetes.yaml")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List a page for each verb under "Commands"."""
    (commands,) = (entry["Commands"] for entry in config.nav if "Commands" in entry)
    commands[:] = [{verb: f"commands/{verb}.md"} for verb in VERBS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the verbs, and the files of the repository that pages link to."""
    for verb in VERBS:
        files.append(File.generated(config, f"commands/{verb}.md", content=command_page(verb)))
    for name in LINKED:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ are right on a forge; on the site the same files are below its root."""
    return markdown.replace("](../examples/", "](examples/")


def command_page(verb: str) -> str:
    """Markdown of ``antransformer VERB --help``."""
    parser = make_parser(verb)
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    chosen = verbs.choices[verb]
    parts = [f"# antransformer {verb}", described(chosen.description or ""), f"```text\n{chosen.usage}\n```"]
    for group in chosen._action_groups:
        entries = [entry(action) for action in group._group_actions if action.help != argparse.SUPPRESS]
        if entries:
            parts += [f"## {(group.title or '').capitalize()}", group.description or "", *entries]
    return "\n\n".join(part for part in parts if part) + "\n"


def described(text: str) -> str:
    """Description of a verb with its examples as a code block."""
    prose, _, examples = text.strip().partition("\nexamples:\n")
    code, _, rest = examples.partition("\n\n")
    lines = "\n".join(line.removeprefix("  ") for line in code.splitlines())
    return "\n\n".join([escaped(prose), *([f"```sh\n{lines}\n```"] if lines else []), escaped(rest)])


def entry(action: argparse.Action) -> str:
    """An option and its help as an item of a definition list."""
    if action.option_strings:
        names = ", ".join(action.option_strings)
    else:
        names = action.dest
    value = action.metavar if isinstance(action.metavar, str) else ""
    if action.nargs != 0 and not value and action.option_strings:
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return f"`{f'{names} {value}'.strip()}`\n:   {escaped(text)}"


def escaped(text: str) -> str:
    """Help texts are plain text: keep their angle brackets and asterisks."""
    return re.sub(r"([*_<>\[\]])", r"\\\1", text)


class Doctests(griffe.Extension):
    """Shows the examples of docstrings (lines from ``>>>`` to the next empty line) as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Put a fence around every example."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"(?m)^>>> .*(?:\n.+)*", lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value
            )
