"""README is executed, short, and names what is public."""

import re
from pathlib import Path

import pytest

import lora_lite as ll

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[1:]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.split("\n")[0])
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_readme_is_short_and_executed():
    assert len(README.read_text().splitlines()) <= 150
    assert len(SNIPPETS) == 2


def test_public_names():
    assert ll.__all__ == sorted(ll.__all__, key=lambda n: (n[0].islower(), n))
    assert all(hasattr(ll, name) for name in ll.__all__)
    assert len(ll.__all__) == 25
    assert ll.LoRA(r=2).r == 2 and ll.JORA.name == "jora"
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        _ = ll.Lora


def test_importing_costs_little(monkeypatch):
    """No heavy or optional package comes with it."""
    import subprocess
    import sys

    heavy = "transformers peft accelerate matplotlib rich tyro sklearn beartype triton pandas"
    script = (
        "import torch, sys; before = set(sys.modules); import lora_lite; "
        f"print([m for m in {heavy.split()} if m in sys.modules and m not in before])"
    )
    monkeypatch.delenv("LORA_LITE_TYPECHECK")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_reviews_are_there():
    reviews = README.parent / "docs" / "reviews"
    files = Path(ll.__file__).parent / "variants"
    for file in files.glob("[a-z]*.py"):
        text = (reviews / f"{file.stem}.md").read_text()
        assert "MATCHES" in text and "tests/fidelity" in text or "test_" in text, file.stem
