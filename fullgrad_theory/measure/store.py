"""A folder in which the batches of an evaluation are kept as they are done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import write_whole
from .results import Results

_INSTEAD = "choose another folder, or remove this one"


@dataclass(frozen=True)
class KeptBatches:
    """Batches in a folder: `settings.json`, and a file of results for each batch, by its start.

    `output`: the model's for the first sample. It is kept with the settings, because a digest of
    the parameters knows nothing of the code that uses them; and compared as numbers, because other
    devices or threads round otherwise. `rank`: of the process that writes.
    """

    folder: Path
    settings: Mapping[str, Any]
    output: Tensor
    rank: int

    def read(self) -> dict[int, Results]:
        """What is there already; `InputError` where it was made in another way."""
        batches = sorted(self.folder.glob("batch-*.json"))
        if not batches and not self._file.exists():
            return {}
        held = self._settings_held()
        found = {int(b.stem.split("-")[1]): Results.load(b) for b in batches}
        if "output" not in held or any("data" not in part.settings for part in found.values()):
            raise InputError(
                f"{self.folder} was kept by an earlier version, without what tells whether its "
                f"results are of this model and of these samples: {_INSTEAD}"
            )
        self._need_same_settings(held)
        return found

    @property
    def _file(self) -> Path:
        return self.folder / "settings.json"

    def _settings_held(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{self._file} holds no settings: {error}; {_INSTEAD}") from error

    def _need_same_settings(self, held: Mapping[str, Any]) -> None:
        differing = sorted(k for k, v in self.settings.items() if held.get(k) != v)
        if not differing and not self._same_output(held["output"]):
            differing = ["the model's output for the first sample"]
        if differing:
            raise InputError(
                f"{self.folder} holds results of another evaluation; it differs in "
                f"{', '.join(differing)}: {_INSTEAD}"
            )

    def _same_output(self, held: Sequence[float]) -> bool:
        """Up to the root of the dtype's precision: far above rounding, far below another model."""
        then, now = torch.tensor(held, dtype=torch.float64), self.output.double().cpu()
        bound = torch.finfo(self.output.dtype).eps ** 0.5 * now.abs().max()
        return then.shape == now.shape and bool((then - now).abs().max() <= bound)

    def write(self, start: int, results: Results) -> None:
        """A file is there whole or not at all: it is written beside, and then named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            kept = {**self.settings, "output": self.output.tolist()}
            write_whole(self._file, json.dumps(kept, indent=1))
        results.save(self.folder / f"batch-{start:08d}.json")
