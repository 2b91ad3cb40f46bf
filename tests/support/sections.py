"""Sections of parameters with other values."""


def changed(section, **values):
    """Copy a section with other values, also those of its sub-sections by their own names."""
    own = {name: value for name, value in values.items() if name in type(section).model_fields}
    for part in ("optimizer", "convergence"):
        inner = getattr(section, part, None)
        if inner is not None:
            found = {k: v for k, v in values.items() if k in type(inner).model_fields}
            own.setdefault(part, inner.model_copy(update=found))
            values = {k: v for k, v in values.items() if k not in found}
    assert values.keys() <= own.keys(), values
    return section.model_copy(update=own)
