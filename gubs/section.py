"""The base of all settings, in its own module so that every room can keep its settings beside its code."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A group of settings: frozen, unknown names refused, docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        """If only part of a section is set, the rest keeps its parent's defaults: to give the matcher another endpoint
        must not change its temperature to that of roles in general.
        """
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {name: _merged(fields[name].default, v) if name in fields else v for name, v in values.items()}


def _merged(default: object, value: object) -> object:
    if not (isinstance(default, Section) and isinstance(value, dict)):
        return value
    defaults = {name: getattr(default, name) for name in type(default).model_fields}
    return defaults | {name: _merged(defaults.get(name), v) for name, v in value.items()}
