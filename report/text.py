"""Text that comes from data, such as names of episodes, for a page."""
from html import escape


JOINER = "\u200d"       # between the parts of an emoji


def clean(text):
    """A name that shows as what it is: what cannot be printed, or would turn the direction of the
    text around it, is shown as an escape; so are the parts of bytes that are not UTF-8."""
    return "".join(c if c.isprintable() or c == JOINER else ascii(c)[1:-1] for c in text)


def html(text):
    """The same for the text or an attribute of an HTML element."""
    return escape(clean(text))
