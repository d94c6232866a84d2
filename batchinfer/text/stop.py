"""Stop strings: where an answer ends."""


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string in it."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]
