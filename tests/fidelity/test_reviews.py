"""Every review quotes code that is there, and names tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REVIEWS = sorted((ROOT / "docs" / "reviews").glob("*.md"))
CODE = {
    line.strip() for path in (ROOT / "src").rglob("*.py") for line in path.read_text().splitlines()
}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in [path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.M)]
}


@pytest.mark.parametrize("review", REVIEWS, ids=lambda path: path.stem)
def test_quoted_code_is_in_the_source(review):
    for block in re.findall(r"```python\n(.*?)```", review.read_text(), re.S):
        for line in block.splitlines():
            assert line.strip() in CODE, f"{review.name} quotes {line.strip()!r}"


@pytest.mark.parametrize("review", REVIEWS, ids=lambda path: path.stem)
def test_named_tests_exist(review):
    named = set(re.findall(r"\btest_\w+", review.read_text()))
    assert named, f"{review.name} names no test"
    assert named <= TESTS, f"{review.name} names {sorted(named - TESTS)}"
