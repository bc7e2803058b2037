"""The Markdown pages of the repository: their text, links, anchors and commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("job", "mgd", "moco", "slurm", "docker", "tests", ".github")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
RESULTS = [page for page in PAGES if "results" in page.parts]  # a study writes these
WRITTEN = [page for page in PAGES if page not in RESULTS]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")


def name(page):
    """Return the page's path from the root of the repository."""
    return str(page.relative_to(ROOT))


def without_fences(text):
    """Return the text without its fenced blocks of code."""
    return re.sub(r"^ *```.*?^ *```\n", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page):
    """Return the targets of the page's links to files and headings."""
    targets = LINK.findall(without_fences(page.read_text()))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(page):
    """Return the anchors that GitHub gives to the page's headings."""
    slugs = []
    for title in re.findall(r"^#+ (.*)$", without_fences(page.read_text()), re.MULTILINE):
        plain = LINK.sub("", title).replace("[", "").replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        slugs.append(slug if slug not in slugs else f"{slug}-{slugs.count(slug)}")
    return slugs


def section(page, title):
    """Return the text below a heading, up to the next heading of its level or above."""
    marks, _, _ = title.partition(" ")
    rest = (ROOT / page).read_text().split(f"\n{title}\n")[1]
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.MULTILINE)[0]


def blocks(page):
    """Return the indented blocks of code of a page, each with its lines joined at backslashes."""
    text = without_fences(page.read_text())
    texts = re.findall(r"(?:(?<=\n\n)|\A)((?:(?: {4,}\S.*)\n(?:\n(?= {4}))?)+)", text)
    joined = [re.sub(r" *\\\n *", " ", block) for block in texts]
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in joined]


def spans(page):
    """Return the pieces of code within the page's sentences, each on one line."""
    lines = without_fences(page.read_text()).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("    "))
    return [" ".join(span.split()) for span in CODE.findall(text)]
