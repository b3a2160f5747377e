"""The one exception type for mistakes a user can mend."""


class ExportError(ValueError):
    """The input cannot be exported; the message says what was given, what is allowed and what to do."""
