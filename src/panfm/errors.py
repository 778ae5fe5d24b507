"""The one exception that a user can cause: raised anywhere, printed by the CLI as one line, exit code 2."""


class UserError(ValueError):
    """What a user can get wrong: the message names the thing, its value, the rule and the way out, on one line.

    Everything else that is raised is a defect of panfm and keeps its traceback.
    """
