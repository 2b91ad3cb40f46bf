"""Place of a stage: its resume folder, its device and the precision of its networks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isim import errors
from isim.runtime import atomic, processes

if TYPE_CHECKING:
    import torch


@dataclass
class Here:
    """Place of a stage: all that passes and trainings know of it.

    Attributes:
        resume: Folder of what an interrupted run goes on from; empty at a first start.
        wanted: Precision that the stage's section asks for: auto, fp32 or bf16.
        name: The stage, in messages.
    """

    resume: Path
    wanted: str = "auto"
    name: str = "isim"

    @property
    def cache(self) -> Path:
        """Folder of what several stages compute alike; the project's .isim, where there is one."""
        return next((path for path in self.resume.parents if path.name == ".isim"), self.resume)

    # Found when they are asked for: a stage without networks never loads torch.
    @cached_property
    def device(self) -> "torch.device":
        """Device of this process (`devices.default`)."""
        from isim.runtime import devices

        return devices.default()

    @cached_property
    def precision(self) -> str:
        """Precision that `wanted` stands for on the device: fp32 or bf16."""
        from isim.runtime import devices

        return devices.resolve_precision(self.wanted, self.device)

    @property
    def machine(self) -> str:
        """Describe what computes: kind of device, precision, and what computes dCRFs."""
        from isim.runtime import devices, kernels

        crf = kernels.crf_used(self.device.type)
        return f"{devices.kind(self.device)} {self.precision} {crf}"

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures recorded as `<name>.json` in the resume folder, or make them now.

        All processes call `make` then, and the first one's figures count. Raises UserError when
        they cannot be written.
        """
        record = self.resume / f"{name}.json"
        written = processes.is_main() and record.exists()
        figures = None
        if written:
            with errors.reading(record, "delete it, and run the same command again", "is damaged"):
                figures = dict(errors.json_of(record))
        found = processes.broadcast(figures)
        if found is None:
            found = processes.broadcast(make())
            if processes.is_main():
                # Not write_json: nan must come back as nan.
                atomic.write_text(record, json.dumps(found))
        return found
