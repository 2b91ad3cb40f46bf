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


def of_frozen(section, sides=(64,), rounds=2, **changes):
    """Changes that give a section of `train_cam` or `train_segmenter` method frozen, at its least.

    `changes` are of `train_cam.frozen`.
    """
    found = {"method": "frozen", "encoder": "test_efficientnet"}
    found["features"] = section.features.model_copy(update={"sides": sides})
    if hasattr(section, "frozen"):
        head = section.frozen.head.model_copy(update={"width": 16, "steps": 20})
        loop = {"head": head, "rounds": rounds, "classifier_steps": 20} | changes
        found |= {"frozen": section.frozen.model_copy(update=loop), "threshold": 0.5}
    else:
        found["head"] = section.head.model_copy(update={"width": 16, "steps": 20})
    return found
