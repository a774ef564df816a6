"""The one error that a user, not a programmer, has to act on, and the sentence it says."""


class UserError(ValueError):
    """One sentence: what was given, what is allowed, what to do. The command line prints it and exits with 2."""


class SaidOnce(UserError):
    """All processes of a run raise it alike; the command line says it in the first one alone."""


class Lost(UserError):
    """Another process of this run is lost. Libraries may still wait for it: who says it ends the process at once."""


def sentence(error: Exception) -> str:
    """The lines of an omegaconf error as one, without its type trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = [line for line in lines if not line.startswith(("object_type", "reference_type"))]
    return " ".join(shown).replace("full_key:", "at")
