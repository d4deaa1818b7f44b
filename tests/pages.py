"""The pages of the documentation, and how tests read them: blocks, sections, headings."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("**/*.md")),
    "search/README.md",
    "benches/README.md",
)
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]


def blocks(language: str, text: str = README) -> list[str]:
    """Return the content of every block of a language, in order."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def without_blocks(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def section(title: str, text: str = README) -> str:
    """Return what stands under a heading of the second level."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text)
    assert found is not None, f"there is no section {title!r}"
    return found[1]


def anchors(text: str) -> set[str]:
    """Return what links may name within a page: its headings, as GitHub writes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_blocks(text))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def shell_lines(text: str) -> list[str]:
    """Return the lines of the shell blocks of a page, continued ones joined."""
    joined = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]
