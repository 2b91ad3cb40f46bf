"""Command line: one command a stage; presets, results, tables, the server's archive.

Nothing heavy is imported before a command runs, so that `--help` and wrong usage answer at once.
"""

import ast
import contextlib
import errno
import inspect
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import typer

from isim import errors
from isim.errors import UserError, hide_secrets, without_secrets
from isim.runtime.ending import unwatch, watch_signals

# Characters of an error that nobody foresaw, which leave room for the file that tells the rest.
_TOLD = 140
# Words of torch, of its CUDA libraries and of OpenCV.
_NO_MEMORY = re.compile(r"(?i)out of memory|can't allocate memory|ALLOC_FAILED|insufficient memory")
# What a path can be that the system takes nowhere: these are no faults of isim's.
_UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)

app = typer.Typer(
    help="ISIM: from image-level tags to segmentation pseudo-labels. `dvc repro` runs the stages "
    "below in order, with the values of params.yaml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command; the list of all would cut its sentence short, were it not given again."""
    sentence, _, _ = (function.__doc__ or "").partition("\n")
    return app.command(function.__name__.replace("_", "-"), short_help=sentence)(function)


def _with_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function that takes `**options` the annotated attributes of a class as such."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        for name, annotation in get_type_hints(kind, include_extras=True).items():
            given = {"default": getattr(kind, name), "annotation": annotation}
            own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **given))
        function.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return function

    return decorate


def _add_stages() -> None:
    """Add a command for each stage, told and numbered by the first line of its page.

    Pages are read, not imported: that takes seconds.
    """
    found = []
    for path in (Path(__file__).parent / "stages").glob("*.py"):
        page = ast.parse(path.read_text(encoding="utf-8"))
        title = (ast.get_docstring(page) or "").partition("\n")[0]
        numbered = re.match(r"Stage (\d+): ", title)
        for node in page.body if numbered else ():
            if numbered and isinstance(node, ast.FunctionDef) and node.name == "run":
                # Parameters, a label set where there is one, and the project folder.
                for_label_set = len(node.args.args) == 3
                found.append((int(numbered[1]), path.stem, title, for_label_set))
    for _, word, title, for_label_set in sorted(found):
        _add_stage(word, title, for_label_set=for_label_set)


def _add_stage(word: str, title: str, *, for_label_set: bool) -> None:
    def plain() -> None:
        _run(word)

    def for_labels(
        labels: Annotated[str, typer.Argument(help="One of the label_sets in params.yaml.")],
    ) -> None:
        _run(word, labels)

    command = for_labels if for_label_set else plain
    command.__name__, command.__doc__ = word, title
    _command(command)


_add_stages()


@_command
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
    from isim.experiments import preset as presets

    if list_ and name is not None:
        raise UserError(f"--list takes no preset; leave out --list to write '{name}'")
    if name is None:
        known = presets.titles()
        width = max(map(len, known))
        for key, title in known.items():
            typer.echo(f"{key:<{width}}  {title}")
        return
    about = presets.write(name, Path("params.yaml"), settings or ())
    words = f" with {', '.join(settings)}" if settings else ""
    typer.echo("\n".join((f"params.yaml now holds preset {name}{words}:", *about)))


@_command
def init(
    where: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR [NAME=VALUE]...",
            help="New folder of the project; parameters that are set, such as train_cam.seed=1.",
        ),
    ],
    *,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; they stay where they are.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="File of the labels; by default it is looked for.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks, if there are any.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the encoder: a file, imagenet or none.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="timm's name of another encoder.")] = None,
    preset: Annotated[
        str, typer.Option(help="Preset that all other parameters come from.")
    ] = "own-images",
) -> None:
    """Make a project of your own images in a new folder."""
    from isim.project import choices, folder, plan
    from isim.runtime import progress

    place, *settings = where
    new = Path(place)
    wishes = choices.Wishes(
        images, labels, masks, weights=weights, encoder=encoder, preset=preset, settings=settings
    )
    folder.require_new(new)
    with progress.watched("init"):
        chosen = choices.make(wishes, new)
        for line in (*chosen.lines(), *folder.create(new, chosen)):
            progress.tell(line)
        try:
            told = plan.make(chosen.params, new).lines()
            told.append(f"{new} is ready: cd {shlex.quote(str(new))} && dvc repro")
        except UserError as error:
            # The project is there, and its data or parameters can be mended.
            told = [f"no plan, as a dry run failed: {error}"]
            there = f"cd {shlex.quote(str(new))}"
            told.append(f"{new} is written; mend that, then: {there} && isim plan && dvc repro")
    for line in told:
        typer.echo(line)


@_command
def plan() -> None:
    """Tell how long the stages will take, and how much disk and memory."""
    from isim.params import load
    from isim.project import choices, growth, lock
    from isim.project import plan as plans
    from isim.runtime import progress

    root = Path.cwd()
    lock.require(root)
    params = load(root / "params.yaml")
    with progress.watched("plan"):
        made = plans.make(params, root)
        unused = growth.lines(params, growth.of_source(choices.look(params.prepare, root)))
    _note([*growth.unseen_labels(params, root), *unused])
    for line in made.lines():
        typer.echo(line)


@_command
def upgrade() -> None:
    """Bring the project in this folder to the isim that is installed."""
    from isim.project import folder

    for line in folder.upgrade(Path.cwd()):
        typer.echo(line)


@_command
def results() -> None:
    """Print the results of the last run."""
    from isim.reporting import results as report

    typer.echo(report.table(Path.cwd()))


@_command
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Show all runs in MLflow, in a browser; Ctrl-C ends it."""
    from isim.reporting import ui as server

    words, environment, address = server.command(Path.cwd(), port)
    typer.echo(f"isim: open {address}")
    sys.stdout.flush()
    os.execve(words[0], words, environment)


@_command
def masks_wanted(
    count: Annotated[int, typer.Argument(min=1, max=1_000_000, help="How many images.")] = 20,
    split: Annotated[str | None, typer.Option(help="Of this split alone.")] = None,
) -> None:
    """List the images whose masks would tell most, and where to put them."""
    from isim.reporting import wanted

    typer.echo(wanted.write(Path.cwd(), count, split))


@_command
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
    """Print the paper's tables beside your own figures."""
    from isim.experiments import cells
    from isim.experiments import tables as printed

    if markdown + csv + commands > 1:
        raise UserError("--markdown, --csv and --commands exclude each other; give one of them")
    if commands:
        typer.echo(cells.commands(table))
        return
    form: Literal["text", "markdown", "csv"] = "csv" if csv else "markdown" if markdown else "text"
    text, note = printed.report(Path.cwd(), table, form)
    typer.echo(text)
    if note:
        typer.echo(f"isim: note: {note}", err=True)


@_command
def compare(
    revisions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REV]...",
            help="Git revisions, or names of DVC experiments; without any all experiments.",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
) -> None:
    """Compare runs by the figures that matter: the workspace, revisions, experiments."""
    from isim.experiments import compare as compared

    text, note = compared.table(Path.cwd(), revisions or (), markdown=markdown)
    typer.echo(text)
    if note:
        typer.echo(f"isim: note: {note}", err=True)


class _Predict:
    """Options of `isim predict`, by the names that `passes.predict.Options` has."""

    model: Annotated[
        Path | None, typer.Option(help="Checkpoint; default: that of the project here.")
    ] = None
    crf: Annotated[bool, typer.Option("--crf", help="Refine masks by the dense CRF.")] = False
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Write <image>_overlay.jpg, too, with a legend.")
    ] = False
    tags: Annotated[
        Path | None,
        typer.Option(help="CSV of images and their tags: no other class is found in them."),
    ] = None
    min_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Pixels less probable become 255.")
    ] = 0.0
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write <image>.npz, too.")
    ] = False
    by_cam: Annotated[
        bool, typer.Option("--cam", help="Take the CAM network and the tags, no segmenter.")
    ] = False
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of --cam; default: train_cam.threshold.")
    ] = None
    side: Annotated[
        int | None,
        typer.Option(min=64, max=8192, help="Longer side to work at; default: masks.side."),
    ] = None
    cleaned: Annotated[
        bool, typer.Option("--clean/--no-clean", help="Remove specks, fill holes.")
    ] = True


@_command
@_with_options(_Predict)
def predict(
    paths: Annotated[list[Path], typer.Argument(metavar="FILES|FOLDERS", help="Images.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; subfolders are kept.")],
    **options: Any,  # noqa: ANN401 - those of _Predict
) -> None:
    """Write masks of any images by the segmenter; exit code 1 if some were unreadable."""
    from isim.api import trained
    from isim.passes import predict as predictor
    from isim.runtime import progress

    options["model"] = options["model"] or trained(Path.cwd(), by_cam=options["by_cam"])
    with progress.watched("predict"):
        left_out = predictor.run(paths, out, predictor.Options(**options), Path.cwd())
    if left_out:
        raise typer.Exit(1)


class _Export:
    """Options of `isim export`; each format takes some of them."""

    source: Annotated[
        str | None,
        typer.Option("--from", help="Folder of label maps, or a label set; default: data/masks."),
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, if not the project's.")
    ] = None
    polygons: Annotated[
        bool, typer.Option("--polygons", help="coco: polygons instead of run lengths.")
    ] = False
    instances: Annotated[
        Literal["parts", "classes"],
        typer.Option(help="coco, yolo, labelstudio: connected parts, or one object a class."),
    ] = "parts"
    copy: Annotated[
        bool, typer.Option("--copy", help="yolo, voc: copy images, not links to them.")
    ] = False
    url: Annotated[
        str | None, typer.Option(help="labelstudio: what an image's address begins with.")
    ] = None
    model: Annotated[
        Path | None, typer.Option(help="onnx: checkpoint; default: the project's segmenter.")
    ] = None


@_command
@_with_options(_Export)
def export(
    form: Annotated[
        Literal["coco", "yolo", "voc", "labelstudio", "overlay", "onnx"],
        typer.Argument(metavar="FORMAT", help="coco, yolo, voc, labelstudio, overlay or onnx."),
    ],
    dest: Annotated[Path, typer.Argument(help="File (coco, onnx) or folder to write.")],
    **options: Any,  # noqa: ANN401 - those of _Export
) -> None:
    """Write masks, or the segmenter (onnx), in the format of another tool."""
    from isim.passes import export as exporter
    from isim.runtime import progress

    if form == "onnx":
        from isim.api import trained

        options["model"] = options["model"] or trained(Path.cwd())
    else:
        options["source"] = options["source"] or "data/masks"
    with progress.watched(f"export {form}"):
        written = exporter.run(form, dest, exporter.Options(**options), Path.cwd())
    typer.echo(written)


@_command
def server_archive(
    labels: Annotated[str, typer.Argument(help="One of the label_sets in params.yaml.")],
    split: Annotated[str, typer.Argument(help="Split that it predicted: test or val.")],
    crf: Annotated[bool, typer.Option("--crf/--no-crf", help="Take what the CRF made.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: below reports/server.")
    ] = None,
) -> None:
    """Pack predictions for the evaluation server of VOC 2012."""
    # Predictions of a label set that was taken off the list stay in data/, as old as they are.
    from isim.params import load
    from isim.reporting import voc_server as server
    from isim.stage import require_label_set

    require_label_set(load(Path("params.yaml")), labels)

    path, count = server.write(Path.cwd(), labels, split, crf=crf, out=out)
    typer.echo(f"{path}: {count} predictions; upload it to VOC 2012's server as comp6")


def _run(stage: str, *arguments: str) -> None:
    from isim.params import load
    from isim.project import growth, lock, pipeline
    from isim.runtime import launcher
    from isim.stage import start

    root = Path.cwd()
    lock.require(root)
    if stage == "prepare":
        pipeline.require(root)
        start(stage, root)
        params = load(root / "params.yaml")
        _note(growth.lines(params, growth.of_project(root)))
        return
    if not launcher.started():
        _note(growth.unseen_labels(load(root / "params.yaml"), root))
    start(stage, root, *arguments)


def _note(lines: list[str]) -> None:
    for line in lines:
        typer.echo(f"isim: note: {errors.one_line(line)}", err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"isim {version('isim')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options of all commands."""


def main() -> None:
    """Entry point: errors of the user become one line and exit code 2."""
    if sys.getfilesystemencoding() != "utf-8":
        # Names of files are of any script, whatever the locale can write; Python decides at start.
        command = [sys.executable, "-X", "utf8", "-m", "isim", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PYTHONUTF8": "1"})
    # Network threads share the cores with dCRF helpers and loaders: one that spins while it waits
    # takes their time. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_missing_streams()
    # Without this a terminated run would skip its context managers: MLflow would show it as
    # running for ever, and loader processes would outlive it. nohup ignores a closed terminal.
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) is not signal.SIG_IGN:
            signal.signal(ends, _terminate)
    watch_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files are of any script, whatever a terminal can show.
            stream.reconfigure(errors="backslashreplace")
            hide_secrets(stream)
    try:
        app()
    except Exception as error:
        # A signal to the whole group ends the loader processes, too: no fault of theirs.
        if ending := _ending(error):
            raise ending from None
        if isinstance(error, UserError):
            _fail(str(error))
        if told := _of_machine(error):
            _fail(errors.one_line(told))
        if isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename:
            why = errors.one_line(f"cannot use {error.filename} ({error.strerror})", 200)
            _fail(f"{why}; name another path, or fix its permissions")
        _tell_unknown(error)
    finally:
        # What libraries do at the end is interrupted without a word, and their children may end.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        unwatch()


def _open_missing_streams() -> None:
    """Open /dev/null for streams that a program is started without (`>&-`, some schedulers).

    The next file to be opened, maybe a database, would have their number, and get what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _ending(error: BaseException) -> SystemExit | None:
    """The end of the program during which `error` came up, if it did."""
    context: BaseException | None = error
    while context is not None and not isinstance(context, SystemExit):
        context = context.__context__
    return context


def _of_machine(error: Exception) -> str:
    """Tell of what the machine lacks, and what to do; empty for errors that are none of its."""
    number = error.errno if isinstance(error, OSError) else None
    # Libraries written in other languages wrap the same conditions in errors of their own.
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"no space left on the disk{where}; free some and run the same command again"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(text):
        return (
            f"not enough memory ({errors.reason(error)}); end what else uses it, or lower batch or "
            "crop of the stage in params.yaml, and run the same command again"
        )
    if isinstance(error, ModuleNotFoundError) and not (error.name or "isim").startswith("isim"):
        return f"the package of {error.name} is not there; pip install it, or install isim anew"
    if re.search("shared object|map segment|static TLS", text):
        return (
            f"a library of isim's cannot be loaded ({errors.reason(error)}); install isim anew, or "
            "give it more memory"
        )
    return ""


def _tell_unknown(error: Exception) -> NoReturn:
    """Keep the traceback of an error that nobody foresaw in a file, and end with one line on it."""
    lines = "".join(traceback.format_exception(error))
    told = errors.one_line(f"{type(error).__name__}: {errors.reason(error)}", _TOLD)
    try:
        path = _errors_file()
        path.write_text(without_secrets(lines), encoding="utf-8", errors="backslashreplace")
        if path.is_relative_to(Path.cwd()):
            # Whole, however long the project's own path is.
            path = path.relative_to(Path.cwd())
        where = f"a fault of isim's: please report it with {path}"
    except OSError as unwritable:
        where = f"a fault of isim's, whose traceback cannot be kept ({errors.reason(unwritable)})"
    print(f"isim: error: {errors.one_line(f'{told}; {where}')}", file=sys.stderr)
    raise SystemExit(1) from None


def _errors_file() -> Path:
    """A new file of the project, readable by its user alone; elsewhere than in a project, of /tmp.

    OSError where neither can be written.
    """
    from isim.runtime.paths import home

    with contextlib.suppress(OSError):
        if Path("params.yaml").exists():
            folder = home(Path.cwd()) / ".isim/errors"
            folder.mkdir(parents=True, exist_ok=True)
            return _new_file(folder)
    return _new_file(None)


def _new_file(folder: Path | None) -> Path:
    number, name = tempfile.mkstemp(".txt", time.strftime("isim-%Y%m%d-%H%M%S-"), folder)
    os.close(number)
    return Path(name)


def _fail(message: str) -> NoReturn:
    print(f"isim: error: {message}", file=sys.stderr)
    raise SystemExit(2)
