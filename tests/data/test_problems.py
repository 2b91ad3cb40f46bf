"""Problems are told by kind: all that end a run at once, and those that do not."""

import pytest

from isim.data import problems
from isim.data.problems import Problem
from isim.errors import UserError


def told(found):
    with pytest.raises(UserError) as caught:
        problems.refuse(found)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_errors_of_all_kinds_are_told_together_and_long_lists_are_cut():
    many = [Problem("odd", f"odd {number}") for number in range(60)]
    lines = told([*many, Problem("bad", "bad file", "f"), Problem("dull", "dull", error=False)])
    assert lines[0] == "the data has 61 problems; mend it and run `isim prepare` again"
    assert lines[1:9] == [f"odd {number}" for number in range(8)]
    assert lines[9:] == [
        "and 52 more: odd",
        "bad file",
        "all of them are in reports/prepare/problems.csv",
    ]
    assert told(many[:2]) == [
        "the data has 2 problems; mend it and run `isim prepare` again",
        "odd 0",
        "odd 1",
    ]
    kinds = [Problem(f"kind {number // 8}", f"line {number}") for number in range(160)]
    assert len(told(kinds)) < 80 and "and 8 more: kind 19" in told(kinds)


def test_warnings_are_no_errors_and_a_line_a_kind():
    found = [Problem("dull", f"dull {number}", error=False) for number in range(3)]
    found.append(Problem("odd", "an odd one", "f.csv", error=False))
    problems.refuse(found)
    assert problems.warnings(found) == ["dull: 3, such as: dull 0", "an odd one"]
    assert problems.rows(found)[-1] == {
        "kind": "odd",
        "severity": "warning",
        "file": "f.csv",
        "what": "an odd one",
    }
