"""Ctrl-C, SIGTERM and SIGHUP: save, say how to go on, and leave.

    leave_on_signals()          # once, at the start of a program
    signals.can_wait = True     # from now on the main thread looks at signals.wanted
    if signals.wanted: ...      # it has saved, and calls leave()

A thread waits for the signals, because Python runs no signal handler while XLA compiles, and XLA
may crash on an orderly way out. Where the main thread has said that it looks, the first signal
waits for it and the second one ends the process at once. Files are written whole or not at all, so
that none is damaged; those that are half-written are removed.
"""

import contextlib
import os
import signal
import sys
import threading

from host.files import open_parts

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What the main thread and the waiting thread tell each other."""

    wanted: int | None = None  # the first signal that has arrived
    can_wait = False  # the main thread will look at `wanted` soon


signals = Signals()


def leave(number: int, said: str) -> None:
    """End the process with the status of a signal, 130 for Ctrl-C, after a line on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    for part in tuple(open_parts):
        with contextlib.suppress(OSError):
            os.unlink(part)
    os.write(2, f"\npgd.py: {said}\n".encode())
    os._exit(128 + number)


def leave_on_signals() -> None:
    """From now on each of the three signals ends the process, unless it is ignored already."""
    handled = [n for n in HANDLED if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores
    if not handled:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in handled:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait():
        while True:
            number = os.read(read, 1)[0]
            if number not in handled:
                continue
            if signals.wanted or not signals.can_wait:
                leave(number, "interrupted; --resume FOLDER continues a run")
            signals.wanted = number
            os.write(2, b"\npgd.py: saving after this step; once more ends it at once\n")

    threading.Thread(target=wait, daemon=True).start()
