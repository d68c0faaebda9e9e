"""What a model's generation_config.json says of sampling, taken where a request says nothing, as transformers' `generate` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelNotFound
from engine.inputs import Fields
from engine.runtime.sampling import SamplingParams

_TOP_K = 50  # transformers' own, of a model that is to be sampled and does not say


@dataclass(frozen=True)
class SamplingDefaults:
    """A model's defaults; None where its file names none. do_sample: text is sampled unless a request gives a temperature of 0."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> SamplingDefaults:
        """From the object in a generation_config.json, which `where` names in errors.

        Raises:
            ModelNotFound: a value of another type, or out of its range.
        """
        fields = Fields(values, where, ModelNotFound, "correct it, or download the model again")

        def number(name: str, low: float, high: float) -> float | None:
            return None if fields.get(name) is None else fields.number(name, low, high)

        temperature = number("temperature", 0.0, 1e10)
        return cls(
            do_sample=fields.boolean("do_sample", False) and temperature != 0,
            temperature=None if temperature is not None and temperature < 1e-10 else temperature,
            top_k=None if fields.get("top_k") is None else fields.integer("top_k", 0, 2**62),
            top_p=number("top_p", 1e-10, 1.0),
            min_p=number("min_p", 0.0, 1.0),
            repetition_penalty=number("repetition_penalty", 1e-10, 1e10),
        )

    def values(self, given: Mapping[str, Any], *, sampled: bool | None = None) -> dict[str, Any]:
        """The defaults that a request leaves open, by their names in `SamplingParams`; those that are as if not named are left out.

        Without a temperature (0: greedy) top_k, top_p and min_p mean nothing. repetition_penalty counts either way.

        Args:
            given: what the request gives; None counts as not given.
            sampled: whether text is sampled where the request does not say; None: as the model's file says.
        """
        do_sample = self.do_sample if sampled is None else sampled
        found: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        temperature = given.get("temperature")
        if temperature is None and do_sample:
            temperature = found["temperature"] = 1.0 if self.temperature is None else self.temperature
        if temperature:
            top_k = _TOP_K if self.top_k is None and self.do_sample else self.top_k
            found |= {"top_k": top_k, "top_p": self.top_p, "min_p": self.min_p}
        idle = {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return {name: value for name, value in found.items() if value is not None and given.get(name) is None and idle.get(name) != value}

    def params(self, given: Mapping[str, Any] | None = None) -> SamplingParams:
        """Sampling parameters of what a request gives (None counts as not given) over the defaults. Raises InvalidOption."""
        own = {name: value for name, value in (given or {}).items() if value is not None}
        return SamplingParams(**self.values(own) | own)


NO_DEFAULTS = SamplingDefaults()
