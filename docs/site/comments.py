"""For griffe: a field's trailing comment (`dim: int  # a multiple of 4`) is its documentation."""

import ast
import io
import tokenize
from typing import Any

import griffe

LAYER = 'flax_vit.layers.Layer'


class Comments(griffe.Extension):
    """Puts them into the docstrings of classes: the fields of linen modules are what these are called with."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, agent: Any, **_: Any) -> None:
        """Reads them, where the source is at hand."""
        tokens = tokenize.generate_tokens(io.StringIO(agent.code).readline)
        comments = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and 'ClassVar' not in ast.unparse(field.annotation):
                words = comments.get(field.end_lineno or field.lineno, '')
                cls.extra['comments'][ast.unparse(field.target)] = words

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Writes them, when it is known what inherits from what."""
        for cls in classes(pkg):
            lineage = [each for each in (cls, *cls.mro()) if each.extra['comments']]
            if LAYER in [each.path for each in lineage]:
                cls.set_member('__init__', constructor(lineage))
                comments = [each.extra['comments'] for each in lineage]
                add_section(cls, 'Args', {name: words for each in comments for name, words in each.items()})
            elif lineage:
                add_section(cls, 'Attributes', cls.extra['comments'])


def classes(module: griffe.Module) -> list[griffe.Class]:
    """All that are defined in a module and below it."""
    below = [each for inner in module.modules.values() if not inner.is_alias for each in classes(inner)]
    return [each for each in module.classes.values() if not each.is_alias] + below


def constructor(lineage: list[griffe.Class]) -> griffe.Function:
    """The `__init__` that linen makes of fields; what all layers have is taken by name."""
    parameters = [griffe.Parameter('self')]
    for owner in lineage:
        by_name = owner.path == LAYER
        kind = griffe.ParameterKind.keyword_only if by_name else griffe.ParameterKind.positional_or_keyword
        for name in owner.extra['comments']:
            field: Any = owner.members[name]
            parameters.append(griffe.Parameter(name, annotation=field.annotation, kind=kind, default=field.value))
    return griffe.Function('__init__', parameters=griffe.Parameters(*parameters))


def add_section(cls: griffe.Class, title: str, comments: dict[str, str]) -> None:
    """Write it into the docstring, before what the class raises."""
    if cls.docstring:
        text, raises, errors = cls.docstring.value.partition('\n\nRaises:\n')
        lines = [f'    {name}: {words}' for name, words in comments.items()]
        cls.docstring.value = '\n'.join([f'{text}\n', f'{title}:', *lines]) + raises + errors
