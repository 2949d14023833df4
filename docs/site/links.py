"""For mkdocs: links that leave docs/ (`../CONTRIBUTING.md#style`) lead to the project's home, as on GitHub."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

# Targets of links and images; a block of code comes first, for there is nothing to follow in it.
TARGET = re.compile(r'^```.*?^```$|(?<=\]\()\.\./[^)\s]+', re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation's own."""

    def followed(entry: Any) -> Any:
        if isinstance(entry, str):
            return outwards(entry, Path(config.docs_dir), config) if entry.startswith('../') else entry
        if isinstance(entry, list):
            return [followed(each) for each in entry]
        return {title: followed(each) for title, each in entry.items()}

    config.nav = followed(config.nav)
    return config


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """A page's."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def followed(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith('`') else outwards(match[0], folder, config)

    return TARGET.sub(followed, markdown)


def outwards(target: str, folder: Path, config: MkDocsConfig) -> str:
    """The address of what a page in this folder calls so; itself where it stays in docs/, which mkdocs looks after."""
    name, hash, anchor = target.partition('#')
    path, docs = (folder / name).resolve(), Path(config.docs_dir).resolve()
    if path.is_relative_to(docs):
        return target
    if not path.exists():
        raise PluginError(f'{folder.name}/: {target} is not there.')
    if anchor and anchor not in anchors(path):
        raise PluginError(f'{folder.name}/: {target} has no such heading.')
    kind = 'tree' if path.is_dir() else 'blob'
    return f'{config.repo_url}/{kind}/main/{path.relative_to(docs.parent).as_posix()}{hash}{anchor}'


def anchors(page: Path) -> set[str]:
    """Those of a page's headings."""
    headings = re.findall(r'^#+ +(.+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {slugify(case='lower')(heading, '-') for heading in headings}
