"""Parameters and data that DVC records of the running stage, as they are when it has ended.

Whoever writes the values of the next experiment into params.yaml while a stage runs would find the
figures of the old ones under the new. So what was read is kept, and compared at the end.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isim.errors import UserError, cut
from isim.params import flatten, read_yaml
from isim.runtime import finished, identity, processes

# All parameters as they were when those of the running stage were read.
_given: dict[str, Any] | None = None


@dataclass(frozen=True)
class Recorded:
    """Parameters and data of a stage that DVC records, as they were when they were read.

    Attributes:
        root: Project folder.
        params: Names of the parameters and sections.
        given: Their values, and others', by dotted name.
        places: Name -> file or folder. A user's own folder of masks, which DVC does not record, is
            none of them.
        times: Digest of the times of change of these.
    """

    root: Path
    params: tuple[str, ...]
    given: Mapping[str, Any]
    places: Mapping[str, Path]
    times: str

    def require_same(self, hashes: Mapping[str, str]) -> None:
        """Check that DVC will record what was read; `hashes` are the md5 of that, by name.

        Raises:
            UserError: Something has changed meanwhile.
        """
        old, now = self.given, _written(self.root)
        starts = tuple(f"{name}." for name in self.params)
        names = [name for name in sorted(old.keys() | now.keys()) if f"{name}.".startswith(starts)]
        wrong = [f"{name} in params.yaml" for name in names if old.get(name) != now.get(name)]
        if self.times != identity.of_times(self.places.values()):
            # Links to a file change its time, too.
            found = identity.of_inputs(self.places)
            wrong += [str(path) for n, path in self.places.items() if found.get(n) != hashes.get(n)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(
                f"{cut(wrong[0], 80)}{more} changed while the stage ran, and DVC would record its "
                "result as one of the new; take the change back and run the same command again to "
                "have the result, or run it as it is to compute the new one"
            )


def remember(root: Path) -> None:
    """Keep the parameters as they are written now, before those of the stage are read."""
    global _given
    _given = _written(root) if _records() else None


def forget() -> None:
    """Keep them no longer: the stage has ended."""
    global _given
    _given = None


def of_stage(root: Path, reads: Mapping[str, Path]) -> Recorded | None:
    """Collect what DVC records of the running stage; None without DVC, and in other processes."""
    if not _records():
        return None
    name = os.environ["DVC_STAGE"].rpartition(":")[2].partition("@")[0]
    entry = finished.stages_of(root / "dvc.yaml").get(name)
    entry = entry if isinstance(entry, dict) else {}
    deps = [(root / str(dep)).absolute() for dep in entry.get("deps") or ()]

    def is_dep(path: Path) -> bool:
        return any(dep.is_relative_to(path) or path.is_relative_to(dep) for dep in deps)

    params = tuple(map(str, entry.get("params") or ()))
    given = _written(root) if _given is None else _given
    places = {name: path for name, path in reads.items() if is_dep(path.absolute())}
    return Recorded(root, params, given, places, identity.of_times(places.values()))


def _records() -> bool:
    return processes.is_main() and finished.under_dvc()


def _written(root: Path) -> dict[str, Any]:
    path = root / "params.yaml"
    return flatten(read_yaml(path)) if path.exists() else {}
