"""What the converter raises and warns."""


class ConversionError(ValueError):
    """Not to be converted; the message says what was found, what was expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConversionWarning(UserWarning):
    """The conversion goes on, with something the caller should know: an assumed field, a rounded dtype."""


def with_article(words: str) -> str:
    """'a ViT', 'an OfficialDeepViT'."""
    return f'{"an" if words[0] in "AEIO" else "a"} {words}'


def printable(text: str) -> str:
    """The text with escapes for what would move a terminal's cursor, which names in a file may hold."""
    return text if text.isprintable() else ''.join(c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in text)
