"""docs/sources.md, CITATION.cff and the package name one paper, one version, one licence."""

import re

from docstring_names import ROOT

CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
SOURCES = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
BIBTEX = dict(re.findall(r"^  (\w+) += \{(.+)\},?$", SOURCES, re.MULTILINE))


def test_the_citation_is_of_this_version():
    for field in ("version", "license"):
        stated = re.search(rf"^{field}: (.+)$", CITATION, re.MULTILINE)[1]
        assert f'{field}="{stated}"' in SETUP


def test_both_cite_the_paper_as_the_document_states_it():
    authors = re.findall(r"family-names: (\w+), given-names: (\w+)", CITATION)
    assert BIBTEX["author"] == " and ".join(f"{family}, {given}" for family, given in authors)
    assert f"title: {BIBTEX['title']}\n" in CITATION and "2511.18740" in CITATION
    page = " ".join((ROOT / "docs" / "equations.md").read_text(encoding="utf-8").split())
    assert BIBTEX["title"] in page and "(Wang, Yang, Wu, Zhang, Hong)" in page
    assert len(SOURCES.splitlines()) <= 30
