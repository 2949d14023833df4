"""What the converter raises and warns."""


class ConversionError(ValueError):
    """The checkpoint is not one that can be converted; the message says what was found, what was expected, what to do."""


class ConversionWarning(UserWarning):
    """The conversion goes on, with something the caller should know: an assumed field, a rounded dtype."""
