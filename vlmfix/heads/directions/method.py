"""What measures directions for a method: parameters, and the state of one measurement, picture by picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmfix.heads.directions.shown import Shown
from vlmfix.models.checkpoint import Checkpoint


class Differences(ABC):
    """One measurement: the differences that pictures make, one after the other."""

    @abstractmethod
    def add(self, shown: Shown, number: int) -> None:
        """Measures the differences that a picture makes.

        Args:
            shown: The picture.
            number: Its number, from 0, which draws depend on.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns what was found, at the end, on the CPU.

        Raises:
            DataError: There were too few pictures.
        """


@dataclass(frozen=True, kw_only=True)
class Measurement(ABC):
    """What is measured for one method, with its parameters."""

    name: ClassVar[str]
    """The method."""
    needs_mask: ClassVar[bool] = False
    """Whether it needs to know which pixels are objects'."""

    def parameters(self) -> dict[str, Any]:
        """Returns what the card says of the parameters, in JSON values."""
        return asdict(self)

    @abstractmethod
    def begin(self, vlm: Checkpoint, question: str, seed: int) -> Differences:
        """Begins a measurement.

        Args:
            vlm: The model.
            question: Asked about every picture.
            seed: Of what is drawn.

        Raises:
            UnsupportedModelError: The model lacks what is measured.
        """
