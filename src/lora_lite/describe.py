"""What a method is, in words."""

import dataclasses
import inspect
import re
from pathlib import Path

from lora_lite.variant import Variant, variant_class


class Description(str):
    """A text that an interpreter shows as it prints."""

    def __repr__(self) -> str:
        return str(self)


def describe(variant: str | type[Variant]) -> Description:
    """A method's documentation, hyperparameters with defaults, and tensors with shapes; of the
    library's own methods also what docs/variants.md says: work, review and measurements.

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
    usual = cls()
    facts = [
        f"  adapts: {cls.site}",
        f"  trained parameters a layer: {parameters(usual)}",
        f"  starts as the identity: {'yes' if usual.starts_as_identity() else 'no'}",
        f"  merges: {'no, ' + reason if (reason := usual.nonlinear()) else 'yes'}",
    ]
    parts = [f"{cls.name} ({cls.__name__})", inspect.getdoc(cls) or ""]
    parts += ["Hyperparameters:\n" + "\n".join(fields)] if fields else []
    parts += ["Tensors:\n" + "\n".join(tensors)] if tensors else []
    parts += ["At the defaults:\n" + "\n".join(facts)]
    parts += ["Measured:\n" + known] if (known := measured(cls.name)) else []
    return Description("\n\n".join(parts))


def measured(name: str) -> str:
    """What the generated docs/variants.md, which the wheel holds too, knows of a method beyond what
    the registry says; nothing where it isn't there."""
    package = Path(__file__).parent
    for path in (package / "variants.md", package.parents[1] / "docs/variants.md"):
        if path.is_file():
            _, _, section = path.read_text(encoding="utf-8").partition(f"\n## {name}\n")
            facts = re.findall(r"^- (.*)", section.split("\n## ")[0], re.M)
            facts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", fact) for fact in facts]
            known = ("Work", "Review", "Digits", "Step")
            return "\n".join(f"  {fact}" for fact in facts if fact.startswith(known))
    return ""


def formula(cls: type[Variant]) -> str:
    """The first sentence of a method's documentation, which says its update."""
    first = (inspect.getdoc(cls) or cls.__name__).split("\n\n")[0]
    return " ".join(first.split()).removesuffix(".")


def papers(cls: type[Variant]) -> list[str]:
    """The arXiv numbers that a method's documentation cites, in order."""
    return list(dict.fromkeys(re.findall(r"arXiv:\s?(\d{4}\.\d{4,5})", inspect.getdoc(cls) or "")))


def parameters(variant: Variant) -> str:
    """How many numbers train at one layer, in the words of the tensors' shapes."""
    terms = []
    for key in variant.tensor_names():
        if variant.specs[key].trainable:
            words = variant.annotations[key].dim_str.split() or ["1"]
            words = [w if re.fullmatch(r"\w+", w) or len(words) == 1 else f"({w})" for w in words]
            shared = " once for all layers" if variant.specs[key].shared else ""
            terms.append("·".join(words) + shared)
    return " + ".join(terms) or "0"
