"""``python -m tprt``: the same program as the ``tprt`` console script."""

import sys

from tprt.cli import main

sys.exit(main())
