"""The one exception for a user's mistake; entry points print it as a single line."""


class UserError(ValueError):
    """Something the user can put right: the message says what, the values, what is allowed and
    what to change. Entry points print it without a traceback and exit with code 2."""
