"""The one exception meant for the person at the keyboard."""


class UserError(Exception):
    """Input that the user can mend: one sentence that names the file or field, what is wrong and the mend.

    The command line prints it without a traceback and exits with status 2.
    """
