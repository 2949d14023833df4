"""What the converter raises and warns."""


class ConversionError(ValueError):
    """Not to be converted; the message says what was found, what was expected and what to do."""


class ConversionWarning(UserWarning):
    """The conversion goes on, with something the caller should know: an assumed field, a rounded dtype."""
