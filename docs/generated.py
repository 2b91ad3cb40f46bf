"""Pages that mkdocs makes of what is there: commands, parameters and presets."""

import re

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from isim import cli
from isim.experiments import overlay, preset

COMMANDS = """# Commands

`isim COMMAND --help` prints the same. Commands of stages are numbered; `dvc repro` runs those that
have something to do, in this order. Wrong usage and mistakes in files end with one line and exit
code 2.
"""
PARAMETERS = """# Parameters

All parameters stand in `params.yaml`, each with its comment; none has a default elsewhere. Below
are those that all presets start from, a section of the file each; `isim preset NAME` and `isim
init` write other values. What belongs to a machine is in [environment variables](environment.md).
"""
PRESETS = """# Presets

`isim preset NAME` writes a preset into `params.yaml`, and prints what stands here.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages."""
    made = {"commands": commands(), "parameters": parameters(), "presets": presets()}
    for name, text in made.items():
        files.append(File.generated(config, f"{name}.md", content=text))
    return files


def commands() -> str:
    """Write the help of each command below a heading of its own."""
    group = typer.main.get_command(cli.app)
    context = typer.Context(group, info_name="isim", terminal_width=90)
    parts = [COMMANDS]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        own = typer.Context(command, info_name=name, parent=context, terminal_width=90)
        parts.append(f"## isim {name}\n\n```text\n{command.get_help(own).strip()}\n```\n")
    return "\n".join(parts)


def parameters() -> str:
    """Write each section of the base of all presets, with its comments, below a heading."""
    text = (overlay.FOLDER / f"{overlay.BASE}.yaml").read_text(encoding="utf-8")
    # Comments at the margin belong to the section that they precede.
    blocks = re.finditer(r"^(?:#.*\n)*(\w+):.*\n(?:(?: .*)?\n)*", text, re.M)
    parts = (f"## {block[1]}\n\n```yaml\n{block[0].strip()}\n```\n" for block in blocks)
    return "\n".join((PARAMETERS, *parts))


def presets() -> str:
    """Write what each preset is, what to expect, how long it takes, and how it is run."""
    parts = [PRESETS]
    for name in preset.titles():
        title, *lines = preset.made(name)[0]
        parts.append(f"## {name}\n\n{title}.\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    # Presets name pages as those who read the file find them.
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", "\n".join(parts))
