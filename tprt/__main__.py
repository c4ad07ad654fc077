"""``python -m tprt``, and the console script ``tprt``."""

import signal
import sys

# Ctrl-C while Python imports the rest ends the program without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tprt.cli import main

if __name__ == "__main__":
    sys.exit(main())
