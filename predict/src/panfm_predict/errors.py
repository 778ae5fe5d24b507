"""What goes wrong for a user of panfm_predict: one line each, no traceback."""


class PredictError(ValueError):
    """What a user can get wrong: the message names the thing, its value, the rule and the way out, on one line."""


class ImageError(PredictError):
    """One image that cannot be read; the others of the same call are not concerned."""
