"""Each promise of the pages of operation stands there in these words, and names tests that exist.

Who changes such a sentence comes here, and says which test holds it now.
"""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = tomllib.loads(Path(__file__).with_name("promises.toml").read_text())


@pytest.mark.parametrize("page", PROMISES)
def test_what_a_page_promises_stands_there_and_is_tested(page):
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
    for promise, tests in PROMISES[page].items():
        assert promise in text, f"docs/{page}.md does not say it in these words any more"
        assert tests, f"no test holds: {promise}"
        for test in tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(), f"{test} holds: {promise}"
