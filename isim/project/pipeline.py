"""The pipeline of a project: dvc.yaml of the clone, for an isim that is installed.

There the stages depend on the code; here they depend on `isim.lock` instead, which names it. What
a stage does, reads and writes is the same: `template` makes the one of the other, so that there is
one source.
"""

import re
from pathlib import Path

from isim.data.sources import readers
from isim.params import Prepare
from isim.project import lock

# A copy of the clone's dvc.yaml after `template`: a wheel has no other.
# Not named dvc.yaml: DVC would take it for a pipeline of the clone.
COPY = Path(__file__).with_name("pipeline.yaml")
PLOTS = Path(__file__).with_name("plots")

_HEAD = f"""\
# The stages, as `isim init` and `isim upgrade` write them. A change of any dependency re-runs the
# stage; {lock.FILE} stands for the code of isim. Tables are cached outs, drawn by `plots` at the
# end; metrics.json is small and belongs into git.
"""


def template(pipeline: str) -> str:
    """Turn the text of the clone's dvc.yaml into that of projects."""
    body = pipeline[pipeline.index("stages:\n") :].replace("cmd: python -m isim ", "cmd: isim ")
    return _HEAD + re.sub(r"(      - isim/.*\n)+", f"      - {lock.FILE}\n", body)


def text(params: Prepare) -> str:
    """Text of a project's dvc.yaml: stage `prepare` depends on the data, too.

    That is the root of the images and a label file elsewhere. A path with a variable is none that
    DVC could follow, and generated data need none.
    """
    named = [] if params.source in readers.GENERATED else ["root"]
    labels = getattr(params, "labels", "auto")
    if named and Path(labels).is_absolute() and not Path(labels).is_relative_to(params.root):
        named.append("labels")
    plain = [name for name in named if not re.search(r"[$~]", getattr(params, name))]
    deps = "".join(f"      - ${{prepare.{name}}}\n" for name in plain)
    first = f"      - {lock.FILE}\n"
    return COPY.read_text(encoding="utf-8").replace(first, first + deps, 1)
