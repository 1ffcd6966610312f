"""What a family is made of: what its models do, and how its files spell the rest."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from tfm_ref.config import TransformerConfig


class HFConfig(dict):
    """A config.json whose missing settings are errors."""

    def __missing__(self, key: str) -> object:
        raise ValueError(f'config.json must have "{key}"; it has {", ".join(sorted(self))}')


Reader = Callable[[HFConfig], object]
"""Reads one field of ours from their settings."""


def read_fields(hf: HFConfig, fields: Mapping[str, object]) -> dict[str, object]:
    """Read our fields: by the name of a setting, by name and default, or by a reader."""
    values = {}
    for ours, how in fields.items():
        if isinstance(how, str):
            values[ours] = hf[how]
        elif isinstance(how, tuple):
            values[ours] = hf.get(*how)
        else:
            values[ours] = how(hf)
    return values


class Family(NamedTuple):
    """Say how the files of a family spell configs and names.

    Args:
        choices: what all models of the family do.
        fields: our field, and the setting that says it: its name, name and default, or a reader.
        only: settings that must have one value, if they are there: no other is built here. The
            value, or a reader of it.
        names: the table of names, as :mod:`tfm_ref.families.names` reads it.
        prefix: what a checkpoint of the body without a head leaves out of all names.
        ignored: tensors that hold nothing that was learned, or a head that is not built here.
        gated_names: the table of names of a model with a gate, where that is another.
        told_by_tensors: our fields that no setting says, and only the tensors do.
    """

    choices: Mapping[str, object]
    fields: Mapping[str, object]
    only: Mapping[str, object]
    names: str
    prefix: str = "model."
    ignored: str = r".*rotary_emb\.inv_freq"
    gated_names: str | None = None
    told_by_tensors: Callable[[Mapping[str, Tensor]], dict[str, object]] = lambda tensors: {}

    def config(self, hf: HFConfig) -> TransformerConfig:
        """Read a config.json.

        Raises:
            ValueError: if a setting is missing, or one has a value of which no model is built.
        """
        for key, wanted in self.only.items():
            group, _, name = key.rpartition(".")
            place = HFConfig(hf[group]) if group else hf
            wanted = wanted(hf) if callable(wanted) else wanted
            if place.get(name, wanted) != wanted:
                raise ValueError(f"{key} must be {wanted!r}; got {place[name]!r}")
        return TransformerConfig(**{**self.choices, **read_fields(hf, self.fields)})

    def names_in(self, config: TransformerConfig) -> str:
        """Give the table of names of a model."""
        return self.gated_names if config.gated and self.gated_names else self.names
