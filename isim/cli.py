"""Command line: one command a stage; presets, results, tables, curves, the server's archive.

Nothing heavy is imported before a command runs, so that `--help` and wrong usage answer at once.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from isim import atomic
from isim.errors import UserError

app = typer.Typer(
    help="ISIM: from image-level tags to segmentation pseudo-labels. `dvc repro` runs the stages "
    "below in order, with the values of params.yaml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def prepare() -> None:
    """Stage 1: read the data source, check it, write data/prepared."""
    _run("prepare")


@app.command()
def train_cam() -> None:
    """Stage 2: the ISIM loop; write models/train_cam and data/pseudo_labels."""
    _run("train_cam")


@app.command()
def export_cams() -> None:
    """Stage 3: write the CAMs of the final network to data/cams."""
    _run("export_cams")


@app.command()
def train_affinity() -> None:
    """Stage 4: train AffinityNet on the CAMs; write models/train_affinity."""
    _run("train_affinity")


@app.command()
def random_walk() -> None:
    """Stage 5: walk the CAMs along the affinities; write data/random_walk."""
    _run("random_walk")


@app.command()
def train_segmenter(
    labels: Annotated[str, typer.Argument(help="One of the label_sets in params.yaml.")],
) -> None:
    """Stage 6: train a segmenter on a label set; write data/predictions."""
    _run("train_segmenter", labels)


@app.command()
def evaluate() -> None:
    """Stage 7: score CAMs and pseudo-labels against the masks; write reports/evaluate."""
    _run("evaluate")


@app.command()
def preset(
    name: Annotated[
        str | None, typer.Argument(help="Without a name the presets are listed.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AXIS=VALUE]...",
            help="Settings of the paper on top of it, such as method=CAM backbone=ResNet-101.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
) -> None:
    """Write a preset into params.yaml; its comments stay."""
    from isim import preset as presets

    if list_ and name is not None:
        raise UserError(f"--list takes no preset; leave out --list to write '{name}'")
    if name is None:
        known = presets.titles()
        width = max(map(len, known))
        for key, title in known.items():
            typer.echo(f"{key:<{width}}  {title}")
        return
    presets.write(name, Path("params.yaml"), settings or ())
    words = f" with {', '.join(settings)}" if settings else ""
    typer.echo(f"params.yaml now holds preset {name}{words}; `dvc repro` runs it")


@app.command()
def results() -> None:
    """Print the result table of the last run and where to look next."""
    from isim import results as report

    typer.echo(report.table(Path.cwd()))


@app.command()
def tables(
    table: Annotated[
        str | None, typer.Option(help="1 to 12, fig4, fig5 or sec4.1; without it all.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write CSV, one line a cell.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print how to run them instead.")
    ] = False,
) -> None:
    """Print the paper's tables beside what the runs known here measured."""
    from isim import tables as printed

    if markdown + csv + commands > 1:
        raise UserError("--markdown, --csv and --commands exclude each other; give one of them")
    if commands:
        typer.echo(printed.commands(table))
        return
    form: Literal["text", "markdown", "csv"] = "csv" if csv else "markdown" if markdown else "text"
    text, note = printed.report(Path.cwd(), table, form)
    typer.echo(text)
    if note:
        typer.echo(f"isim: note: {note}", err=True)


@app.command()
def server_archive(
    labels: Annotated[str, typer.Argument(help="One of the label_sets in params.yaml.")],
    split: Annotated[str, typer.Argument(help="Split that it predicted: test or val.")],
    crf: Annotated[bool, typer.Option("--crf/--no-crf", help="Take what the CRF made.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: below reports/server.")
    ] = None,
) -> None:
    """Pack predictions into the archive that VOC's evaluation server takes."""
    # Predictions of a label set that was taken off the list stay in data/, as old as they are.
    _require_label_set(labels)
    from isim import server

    path, count = server.write(Path.cwd(), labels, split, crf, out)
    typer.echo(f"{path}: {count} predictions; upload it to VOC 2012's server as comp6")


@app.command()
def curves(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(help="DVC experiments, or git revisions; without any the workspace."),
    ] = None,
    workspace: Annotated[
        bool, typer.Option("--workspace", help="Draw the workspace beside them, too.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("reports/curves.png"),
    column: Annotated[
        str, typer.Option(help="cam_miou (before dCRF) or pseudo_label_miou.")
    ] = "cam_miou",
) -> None:
    """Draw mIoU over the epochs, a line for each experiment, or of the workspace."""
    from isim import curves as drawn

    names = drawn.draw(Path.cwd(), experiments or [], column, out, with_workspace=workspace)
    typer.echo(f"{out} shows {', '.join(names)}")


def _require_label_set(name: str) -> None:
    from isim.params import load

    known = [entry.name for entry in load(Path("params.yaml")).label_sets]
    if name not in known:
        raise UserError(
            f"no label set '{name}' in params.yaml; label_sets has {', '.join(known) or 'none'}"
        )


def _run(stage: str, *arguments: str) -> None:
    """Run a stage, in as many processes as the environment asks for.

    Args:
        stage: Its word.
        arguments: What it takes beside its section: a label set.
    """
    from isim import distributed
    from isim.params import home, load

    root = Path.cwd()
    with distributed.started(home(root) / ".isim"):
        # Checked before the stage is imported: a wrong parameter is told at once.
        section = getattr(load(Path("params.yaml")), stage)
        for name in arguments:
            _require_label_set(name)
        if stage != "prepare" and not distributed.by_torchrun():
            from isim import launcher

            if options := launcher.options():
                launcher.launch(options, [stage.replace("_", "-"), *arguments])
        if stage == "prepare" and not distributed.is_writer():
            return
        with _alone("-".join((stage, *arguments)), root):
            importlib.import_module(f"isim.stages.{stage}").run(section, *arguments, root)


@contextlib.contextmanager
def _alone(stage: str, root: Path) -> Iterator[None]:
    """Wait until no other run of `stage` (for a label set) for this repository is under way.

    The resume state of a stage belongs to the repository, and several runs can want it:
    `dvc exp run --temp` beside `dvc repro`, several workers of `dvc queue start`, or a stage
    that outlived its DVC. A run of several processes waits on every disk.
    """
    from filelock import FileLock, Timeout

    from isim import distributed
    from isim.params import home

    path = home(root) / ".isim" / f"{stage}.lock"
    atomic.make_directory(path.parent)
    lock = FileLock(path)

    def acquire() -> bool:
        if not distributed.is_writer():
            return True
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise atomic.unwritable(path, error) from error
        return True

    told = False
    while not all(distributed.gather(acquire())):
        if not told and distributed.is_main():
            typer.echo(f"isim: waiting for another run of {stage} to end ({path})", err=True)
        told = True
        # Two runs of the same hosts must not each hold a disk and wait for the other's.
        lock.release()
        time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    """Entry point: errors of the user become one line and exit code 2."""
    # Network threads share the cores with dCRF workers and loaders: one that spins while it waits
    # takes their time. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without this a terminated run would skip its context managers: MLflow would show it as
    # running for ever, and worker processes would outlive it.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except Exception as error:
        # A signal to the whole group ends the helper processes, too: no fault of theirs.
        if ending := _ending(error):
            raise ending from None
        if isinstance(error, UserError):
            _fail(str(error))
        if not _disk_is_full(error):
            raise
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        _fail(f"no space left on the disk{where}; free some and run the same command again")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _ending(error: BaseException) -> SystemExit | None:
    """The end of the program during which `error` came up, if it did."""
    context: BaseException | None = error
    while context is not None and not isinstance(context, SystemExit):
        context = context.__context__
    return context


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries written in other languages wrap the same condition in errors of their own.
    return "No space left on device" in str(error)


def _fail(message: str) -> NoReturn:
    print(f"isim: error: {message}", file=sys.stderr)
    raise SystemExit(2)
