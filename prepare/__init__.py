"""Raw downloads -> prepared arrays, one script a data set: `python -m prepare.crema_d --help`.

Every script of the project imports this package first, and then torch, which takes two seconds.
Until `harness.arguments.guard` watches over the work, Ctrl-C ends here in one line.
"""
import sys


def one_line(kind, error, trace) -> None:
    """What Python calls at the end of a program that nobody caught an error of."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if not hasattr(sys, "ps1"):                           # who types in Python wants to see it all
    sys.excepthook = one_line
