"""What the methods ask of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple


class Target(NamedTuple):
    """Output rows of a linear: `size` units of the model's width from `offset` units on; `size` None = all rows."""

    module: str
    offset: int = 0
    size: int | None = None


class Family(ABC):
    """A model architecture.

    name: as users know it.
    text_encoders: ComfyUI's attribute names of the encoders in its CLIP.
    text_rows: the encoder whose tokens are the rows of the model's text, in order from row 0.
    """

    name: str
    text_encoders: frozenset[str]
    text_rows: str

    @abstractmethod
    def owns(self, diffusion_model: object) -> bool:
        """Whether this is ComfyUI's implementation of the family."""

    @abstractmethod
    def targets(self) -> dict[str, Target]:
        """Every module name that adapter files use for this family, with dots, to the target in ComfyUI's model."""

    @abstractmethod
    def acts_on_text_only(self, module: str) -> bool:
        """Whether the inputs of this linear are exactly the rows of the text, so that single tokens can be chosen."""

    @abstractmethod
    def width(self, diffusion_model: Any) -> int:
        """Hidden size of a loaded model."""

    @abstractmethod
    def text_modulations(self, diffusion_model: Any) -> list[str]:
        """Paths of the modules that give the text stream its modulation, as (attention, mlp) with shift and scale."""
