"""The one error that ends an emulated launch."""


class EmulatorError(RuntimeError):
    """An access out of bounds, a race, a hang, a barrier that not all reach, or PTX that the emulator does not know."""
