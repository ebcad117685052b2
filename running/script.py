"""The first and the last lines of a script.

    from running import script

    # Before PyTorch, whose import takes seconds.
    if __name__ == "__main__":
        arguments = script.begin("train.py", __doc__)
    …
    def main(args):
        script.run("train.py", __doc__, args, train)

Next to nothing is imported before signals are caught: until then Ctrl-C would end in a traceback.
"""
from running import stop


def begin(name, doc):
    """Catches signals, then does everything that needs no PyTorch: `command_line.begin`."""
    stop.begin_script()
    from running import command_line
    return command_line.begin(name, doc)


def run(name, doc, args, work):
    """The main function of a script: `command_line.run`."""
    from running import command_line
    command_line.run(name, doc, args, work)
