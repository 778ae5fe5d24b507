"""panfm: self-supervised multimodal foundation models in dermatology, from an archive of images to a leaderboard."""

__version__ = "0.1.0"
