"""Build hooks of the documentation site: pages of the commands, files outside docs/, and examples in docstrings."""

import argparse
import html
import re
import textwrap
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
    prose, examples = split_description(chosen.description or "")
    parts = [f"# antransformer {verb}", f"```text\n{chosen.usage}\n```", prose, examples]
    for group in chosen._action_groups:
        shown = (action for action in group._group_actions if action.help is not argparse.SUPPRESS)
        entries = [entry(action, chosen) for action in shown if action.dest != "help"]
        if entries:
            parts += [f"## {(group.title or '').capitalize()}", group.description or "", *entries]
    return "\n\n".join(part for part in parts if part) + "\n"


def split_description(text: str) -> tuple[str, str]:
    """Return the prose of a verb's description, and its examples as a code block."""
    prose, _, rest = text.strip().partition("\nexamples:\n")
    examples, _, more = rest.partition("\n\n")
    paragraphs = [*prose.strip().split("\n\n"), *more.strip().split("\n\n")]
    # Paragraphs with indented lines are lists in columns.
    marked = [f"```text\n{part}\n```" if "\n  " in part else escaped(part) for part in paragraphs]
    return "\n\n".join(marked), f"```sh\n{textwrap.dedent(examples)}\n```" if examples else ""


def entry(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """An option and its help as an item of a definition list."""
    formatter = parser._get_formatter()
    value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
    names = f"{', '.join(action.option_strings)} {value}".strip()
    return f"`{names}`\n:   {escaped(formatter._expand_help(action))}"


def escaped(text: str) -> str:
    """Help texts are plain text: escape what Markdown and HTML would read as markup."""
    return re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False))


class Doctests(griffe.Extension):
    """Shows the examples of docstrings (lines from ``>>>`` to the next empty line) as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Put a fence around every example."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"(?m)^>>> .*(?:\n.+)*", lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value
            )
