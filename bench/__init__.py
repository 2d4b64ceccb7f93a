"""Programs that use persistrnn from the outside: the main job and the measurements."""


class UsageError(Exception):
    """A command that cannot be carried out: names the given value, what is allowed and the remedy."""
