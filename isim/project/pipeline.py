"""The pipeline of a project: dvc.yaml of the clone, for an isim that is installed.

There the stages depend on the code; here they depend on `isim.lock` instead, which names it. What
a stage does, reads and writes is the same: `template` makes the one of the other, so that there is
one source.
"""

import os
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from isim.data.formats.labels import AUTO
from isim.data.sources import readers
from isim.errors import UserError
from isim.params import Prepare, load, read_yaml
from isim.project import lock

FILE = "dvc.yaml"

# A copy of the clone's dvc.yaml after `template`: a wheel has no other.
# Not named dvc.yaml: DVC would take it for a pipeline of the clone.
COPY = Path(__file__).with_name("pipeline.yaml")
PLOTS = Path(__file__).with_name("plots")

_HEAD = f"""\
# The stages, as `isim init` and `isim upgrade` write them. A change of any dependency re-runs the
# stage; {lock.FILE} stands for the code of isim. Tables are cached outs, drawn by `plots` at the
# end. metrics.json has the few figures that `dvc metrics show` and `dvc exp show` compare, and
# belongs into git; figures.csv has all of a stage.
"""


def template(pipeline: str) -> str:
    """Turn the text of the clone's dvc.yaml into that of projects."""
    body = pipeline[pipeline.index("stages:\n") :].replace("cmd: python -m isim ", "cmd: isim ")
    return _HEAD + re.sub(r"(      - isim/.*\n)+", f"      - {lock.FILE}\n", body)


def text(params: Prepare) -> str:
    """Text of a project's dvc.yaml: stage `prepare` depends on the data, too."""
    deps = "".join(f"      - {dep}\n" for dep in _data(params))
    first = f"      - {lock.FILE}\n"
    return COPY.read_text(encoding="utf-8").replace(first, first + deps, 1)


def _data(params: Prepare) -> dict[str, str]:
    """Find the dependencies on data, as dvc.yaml writes them, and their paths.

    They are the root of the images and a label file elsewhere. A path with a variable is none that
    DVC could follow, and generated data need none.
    """
    if params.source in readers.GENERATED:
        return {}
    found = {"${prepare.root}": params.root}
    # Relative ones are below the root, unless they leave it again.
    labels = os.path.normpath(Path(params.root, params.labels))
    if params.labels != AUTO and not Path(labels).is_relative_to(os.path.normpath(params.root)):
        found["${prepare.labels}" if Path(params.labels).is_absolute() else labels] = labels
    return {dep: path for dep, path in found.items() if not re.search(r"[$~]", path)}


def require(root: Path) -> None:
    """Check that a project's dvc.yaml depends on the data that its params.yaml names.

    Raises:
        UserError: It does not, or the parameters are wrong.
    """
    if not (root / lock.FILE).exists() or not (root / FILE).exists():
        return
    stage = read_yaml(root / FILE).get("stages", {}).get("prepare", {})
    known = set(map(_path, stage.get("deps", ())))
    for dep, path in _data(load(root / "params.yaml").prepare).items():
        if not known & {dep, path}:
            raise UserError(
                f"{FILE} does not depend on {path}, which params.yaml names, so that its changes "
                "would go unnoticed; run `isim upgrade`, then `dvc repro`"
            )


def require_apart(params: Prepare, root: Path) -> None:
    """Check that data and results of the project `root` do not overlap: DVC runs no such pipeline.

    Raises:
        UserError: A folder of data holds what a stage writes, or lies in it.
    """
    stages = YAML(typ="safe").load(COPY.read_text(encoding="utf-8"))["stages"].values()
    kinds = ("outs", "metrics", "plots")
    # A name by a variable, such as that of a label set, stands for its whole folder.
    written = [
        root.resolve() / re.sub(r"/[^/]*\$.*", "", _path(out))
        for stage in stages
        for kind in kinds
        for out in stage.get(kind, ())
    ]
    for path in _data(params).values():
        data = (root / path).resolve()
        for out in written:
            if out.is_relative_to(data) or data.is_relative_to(out):
                raise UserError(
                    f"the data in {data} and {out}, which a stage writes, would lie in each other; "
                    f"make the project outside, such as in {data.parent / 'project'}, or move the "
                    "images to a folder of their own"
                )


def _path(entry: str | dict[str, Any]) -> str:
    """Path of a dependency or an out of dvc.yaml, which may have options."""
    return entry if isinstance(entry, str) else next(iter(entry))
