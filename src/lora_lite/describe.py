"""What a method is, in words."""

import dataclasses
import inspect

from lora_lite.variant import Variant, variant_class


class Description(str):
    """A text that an interpreter shows as it prints."""

    def __repr__(self) -> str:
        return str(self)


def describe(variant: str | type[Variant]) -> Description:
    """A method's documentation, hyperparameters with defaults, and tensors with shapes.

    Raises: KeyError with the nearest names for an unknown name.
    """
    cls = variant_class(variant) if isinstance(variant, str) else variant
    fields = [f"  {f.name} = {f.default!r}" for f in dataclasses.fields(cls)]
    tensors = [
        f"  {key} ({', '.join(cls.annotations[key].dim_str.split())}): "
        + ("trained" if spec.trainable else "frozen" if spec.saved else "frozen, not saved")
        + (", shared by all layers" if spec.shared else "")
        for key, spec in cls.specs.items()
    ]
    parts = [f"{cls.name} ({cls.__name__})", inspect.getdoc(cls) or ""]
    parts += ["Hyperparameters:\n" + "\n".join(fields)] if fields else []
    parts += ["Tensors:\n" + "\n".join(tensors)] if tensors else []
    return Description("\n\n".join(parts))
