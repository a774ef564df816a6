"""The one error that a user, not a programmer, has to act on."""


class UserError(ValueError):
    """One sentence: what was given, what is allowed, what to do. The command line prints it and exits with 2."""
