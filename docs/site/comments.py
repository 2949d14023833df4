"""For griffe: a field's trailing comment (`dim: int  # a multiple of 4`) is its documentation."""

import ast
import io
import tokenize
from typing import Any

import griffe

LAYER = 'flax_vit.layers.Layer'


class Comments(griffe.Extension):
    """Puts them under the fields of classes; a linen module's, which are what it is made with, under its `Args`."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, agent: Any, **_: Any) -> None:
        """Reads them, where the source is at hand."""
        tokens = tokenize.generate_tokens(io.StringIO(agent.code).readline)
        comments = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and 'ClassVar' not in ast.unparse(field.annotation):
                words = comments.get(field.end_lineno or field.lineno, '')
                cls.extra['comments'][ast.unparse(field.target)] = words

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Hands them out, when it is known what is a module."""
        for cls in classes(pkg):
            lineage = [each for each in (cls, *cls.mro()) if each.extra['comments']]
            if cls.path != LAYER and LAYER in [each.path for each in lineage]:
                document_module(cls, lineage)
            else:
                for name, words in cls.extra['comments'].items():
                    field: Any = cls.members[name]
                    field.docstring = griffe.Docstring(words, parent=field) if words else None


def classes(module: griffe.Module) -> list[griffe.Class]:
    """All that are defined in a module and below it."""
    below = [each for inner in module.modules.values() if not inner.is_alias for each in classes(inner)]
    return [each for each in module.classes.values() if not each.is_alias] + below


def document_module(cls: griffe.Class, lineage: list[griffe.Class]) -> None:
    """Give it the constructor that linen would, and the docstring its arguments, before what it raises."""
    init = griffe.Function('__init__', parameters=griffe.Parameters(griffe.Parameter('self')))
    arguments = ''
    for each in lineage:  # what all layers have is taken by name
        kind = griffe.ParameterKind.keyword_only if each.path == LAYER else griffe.ParameterKind.positional_or_keyword
        for name, words in each.extra['comments'].items():
            field: Any = each.members[name]
            init.parameters.add(griffe.Parameter(name, annotation=field.annotation, kind=kind, default=field.value))
            arguments += f'    {name}: {words}\n'
    cls.set_member('__init__', init)
    cls.docstring = cls.docstring or griffe.Docstring('', parent=cls)
    text, raises, errors = cls.docstring.value.partition('\n\nRaises:\n')
    cls.docstring.value = f'{text}\n\nArgs:\n{arguments}{raises[1:]}{errors}'
