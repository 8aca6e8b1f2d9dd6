"""Every deliberate break still applies, and names tests that exist; tests/breaks/run.py shows that they fail."""

import pytest

from tests.breaks.run import ROOT, load

BREAKS = load()


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_applies_to_the_code_as_it_is(one):
    text = (ROOT / one.file).read_text()
    assert text.count(one.old) == 1, f"its old text must occur once in {one.file}"
    assert one.new != one.old and one.invariant
    assert one.tests, "it must name the test that holds its invariant"
    for test in one.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file(), test


def test_there_are_at_least_25_with_different_invariants():
    assert len({one.invariant for one in BREAKS}) == len(BREAKS) >= 25
