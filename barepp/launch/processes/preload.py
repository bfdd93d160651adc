"""Imported by the fork server and by nobody else: what it does once, so that no rank has to.

While it imports torch, Ctrl-C would make it print a traceback, and the launcher's death would go
unnoticed. So those two come first. The rest is what a rank imports, before it is a rank.
"""

import os

from barepp.worker.process import PARENT_PID, die_with_parent, leave_terminal

leave_terminal()
die_with_parent(int(os.environ.pop(PARENT_PID, "0")))

import barepp.train.pipeline  # noqa: E402
import barepp.worker.main  # noqa: E402, F401
