"""What a quantization_config of quant_method "saap" may say: known values, modules that it leaves; plain Python."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from saap.stored_weight import GROUPS, METHOD

VERSION = 1  # of the stored form
KNOWN: Mapping[str, tuple[int, ...]] = {"version": (VERSION,), "bits": (4, 8), "group_size": GROUPS}

Form = TypeVar("Form", bound="StoredForm")


def is_known(key: str, value: object) -> bool:
    """Whether ``value`` is a whole number that ``key`` takes: no bool, and no 4.0."""
    return type(value) is int and value in KNOWN[key]


def names_in(value: object) -> tuple[str, ...] | None:
    """The names that modules_to_not_convert lists, none for None; None for what is no list of names."""
    if value is None:
        return ()
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return None
    names = tuple(value)
    return names if all(isinstance(name, str) for name in names) else None


def is_left(name: str, kept: Iterable[str]) -> bool:
    """Whether the module ``name`` stays as it was: ``kept`` are whole components at the end of its name."""
    return any(f".{name}".endswith(f".{each}") for each in kept)


@dataclass(frozen=True)
class StoredForm:
    """How the Linears of the decoder layers are stored; ``kept`` are ends of names of modules left as they were."""

    bits: int
    group_size: int
    kept: tuple[str, ...] = ()

    @classmethod
    def read(cls: type[Form], config: Mapping[str, Any]) -> Form:
        """Of a quantization_config; ValueError naming the key for what this version cannot read."""
        for key, known in KNOWN.items():
            if not is_known(key, value := config.get(key)):
                choice = " or ".join(map(str, known))
                raise ValueError(f'quantization_config ("{METHOD}"): expected {key} {choice}, got {value!r}')
        kept = names_in(given := config.get("modules_to_not_convert"))
        if kept is None:
            raise ValueError(
                f'quantization_config ("{METHOD}"): expected modules_to_not_convert to be a list of names, '
                f"got {given!r}"
            )
        return cls(config["bits"], config["group_size"], kept)

    def keeps(self, name: str) -> bool:
        """Whether the module ``name`` is left as it was."""
        return is_left(name, self.kept)

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group_size}"
