"""The one exception for a mistake that the user can mend."""


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1; library callers may catch it.
    """
