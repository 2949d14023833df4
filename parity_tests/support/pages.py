"""The README, the pages under docs/, and their code."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]


def blocks(page: pathlib.Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of the page's code blocks in any of these languages, in their order."""
    text = page.read_text(encoding='utf-8')
    return re.findall(rf'^```({"|".join(languages)})\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
