"""How docstrings read: each begins with a verb or a noun, and no sentence stands on its head."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Prepositions, conjunctions, question words and auxiliary verbs: with one of these first, a reader
# learns the circumstance before the thing.
NOT_FIRST = """
about above according across after against along although among and are around as at because
before behind below beneath beside besides between beyond but by can could depending despite
does during except for from given had has have here how however if in inside instead into is it
its like may might must near nor now of off on once onto or otherwise out outside over per
rather regardless shall should since so than that then there though through throughout thus till
to together toward towards under unless until up upon using via was were what whatever when
whenever where whereas wherever whether which while who whom whose why will with within without
would
"""
# "Of a resumed run all rows again": a genitive before what it belongs to.
ON_ITS_HEAD = re.compile(r"(?:# |[.!?]\s+|\n\n\s*)Of (?!course)")


def sources():
    for folder in ("isim", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text()


def docstrings(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def faults(text):
    """Faults of a docstring, in words."""
    first = re.match(r"[\w'-]*", text)[0]
    if first.lower() in NOT_FIRST.split():
        yield f"begins with {first}"
    if not text.split("\n\n")[0].endswith("."):
        yield "its first paragraph has no full stop"


def test_docstrings_begin_with_a_verb_or_a_noun_and_end_with_a_full_stop():
    found = [
        f"{path}:{line}: {fault}: {text.splitlines()[0]}"
        for path, source in sources()
        for line, text in docstrings(source)
        for fault in faults(text)
    ]
    assert found == [], "\n" + "\n".join(found)


def test_no_sentence_of_a_docstring_or_a_comment_stands_on_its_head():
    found = [
        f"{path}:{source.count(chr(10), 0, match.end()) + 1}: Of {source[match.end() :][:50]!r}"
        for path, source in sources()
        for match in ON_ITS_HEAD.finditer(source)
    ]
    assert found == [], "\n" + "\n".join(found)
