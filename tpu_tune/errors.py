"""The one exception for a mistake that the user can mend."""


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 1; library callers may catch it.

    Args:
      message: the line. What it quotes of a file may have line breaks in it; they become blanks.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).splitlines()))
