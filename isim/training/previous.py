"""The last network that train_cam trained, kept for the next run to start from.

DVC deletes what a stage made before it runs the stage again. The copy in `previous/`, where isim
keeps what may be deleted at any time, outlives that; each good end of the stage replaces it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from isim import errors
from isim.errors import UserError
from isim.models import cam, common
from isim.models.cam import CamConfig, CamNetwork
from isim.models.frozen import FrozenNetwork
from isim.params import TrainCam
from isim.runtime import checkpoint, identity, progress

# Fields of a configuration that change no weight that is taken over, beside the classes.
_FREE = {"threshold", "decoder_labels", "encoder_norm", "affinity", "tau", "beta", "temperature"}
_FREE |= {"steps", "head_kind", "head_width", "classes", "feature_scales"}
# Entry of the header that tells where a network comes from.
_ABOUT = "about"
_TOLD = ("identity", "rounds", "date", "code", "supervision")
_REMEDY = "set that back, or train_cam.start: none"


@dataclass(frozen=True)
class Started:
    """A previous network that a run starts from.

    Attributes:
        network, config: The network.
        path: Copy of its file, which is this run's until it ends.
        identity: First 8 digits of the md5 of the `model.safetensors` that it was published as.
        rounds: Number of its last round.
        date: Time at which its training ended, UTC.
        code: Digest of the code of isim that trained it.
        supervision: That of its encoder's first weights.
    """

    network: CamNetwork | FrozenNetwork
    config: CamConfig
    path: Path
    identity: str
    rounds: int
    date: str
    code: str
    supervision: str


class LastNetwork:
    """Place of the last network, for one run of train_cam."""

    def __init__(self, base: Path, params: TrainCam, data: Path) -> None:
        """Find the place below `base`; a run is known by its parameters and its data."""
        self._file = base / "previous/train_cam.safetensors"
        self._params, self._data = params, data
        self._key = ""

    def begin(self, network: nn.Module, config: CamConfig) -> Started | None:
        """Let a run start from the last network, or go on with the one that it began with.

        A network that is trained whole gets its weights; of a frozen one the caller takes the
        head. Returns None, and tells so, where there is no last network.

        Raises:
            UserError: It has other classes, another method or encoder, or is damaged.
        """
        values = self._params.model_dump(mode="json")
        told = {"params": values, "data": identity.md5(self._data)}
        self._key = identity.digest(told)
        path = checkpoint.pin(self._file, self._key)
        if path is None:
            progress.tell(
                "train_cam: there is no previous network; starts from the encoder's weights, as "
                "with start: none"
            )
            return None
        try:
            started = self._load(path, config)
            self._take(network, started.network)
        except UserError:
            # Nothing began that could go on.
            self.end()
            raise
        other = "" if started.code == identity.of_code("train_cam") else ", by another isim"
        progress.tell(
            f"train_cam: starts from the previous network {started.identity} (round "
            f"{started.rounds}, {started.date}{other})"
        )
        return started

    def _take(self, network: nn.Module, previous: CamNetwork | FrozenNetwork) -> None:
        """Give a network the previous one's weights; a frozen one must have its encoder's."""
        if not isinstance(network, FrozenNetwork):
            network.load_state_dict(previous.state_dict())
            return
        tensors = [one.encoder.state_dict() for one in (network, previous)]
        if len({identity.of_tensors(state) for state in tensors}) > 1:
            raise UserError(
                "train_cam.start: the previous network's encoder has other weights than "
                f"train_cam.weights ({self._params.weights}) gives; {_REMEDY}"
            )

    def _load(self, path: Path, config: CamConfig) -> Started:
        try:
            errors.regular(path)
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            told, known = json.loads(header[_ABOUT]), common.read_config(path, CamConfig)
            about = {name: told[name] for name in _TOLD}
        except (OSError, KeyError, TypeError, ValueError, SafetensorError, UserError) as error:
            raise UserError(
                f"train_cam.start: the previous network in {path} is damaged; delete the folder "
                f"{path.parent} to start from the encoder's weights"
            ) from error
        _require_alike(known, config)
        network, known = cam.load(path)
        return Started(network, known, path, **about)

    def keep(
        self, model: Path, network: nn.Module, config: CamConfig, *, about: Mapping[str, Any]
    ) -> None:
        """Keep a trained network, published as the file `model`, in the place of the last one.

        `about` is the report. Raises UserError when it cannot be written.
        """
        told = {
            "identity": identity.md5(model)[:8],
            "rounds": about["rounds"],
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "code": identity.of_code("train_cam"),
            "supervision": about["supervision"],
        }
        common.save(self._file, network, config, **{_ABOUT: json.dumps(told)})
        progress.tell(
            f"train_cam: network {told['identity']} is kept for start: previous in {self._file} "
            f"({model.stat().st_size / 1e9:.2f} GB, may be deleted at any time)"
        )

    @property
    def held(self) -> list[Path]:
        """Copy that the run began with, to be deleted when its result is there for good."""
        return [checkpoint.pinned(self._file, self._key)] if self._key else []

    def end(self) -> None:
        """End the run: the next one of the same parameters and data starts from its network."""
        if self._key:
            checkpoint.unpin(self._file, self._key)


def _require_alike(known: CamConfig, wanted: CamConfig) -> None:
    """Check that the weights of one network are those of another. Raises UserError if not."""
    if known.classes != wanted.classes:
        more, less = (
            [name for name in some if name not in others]
            for some, others in ((wanted.classes, known.classes), (known.classes, wanted.classes))
        )
        what = " and ".join(filter(None, (_named("new", more), _named("gone", less))))
        raise UserError(
            f"train_cam.start: the classes are not those of the previous network "
            f"({what or 'another order'}); {_REMEDY}"
        )
    for name, old in vars(known).items():
        new = getattr(wanted, name)
        if name not in _FREE and old != new:
            raise UserError(
                f"train_cam.start: the previous network has {name} {old}, this run {new}; {_REMEDY}"
            )


def _named(word: str, names: Sequence[str]) -> str:
    shown = [name[:20] for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word}: {', '.join(shown)}{more}" if names else ""
