"""`python -m rto` and `accelerate launch -m rto`: the command `rto`."""

import sys

from rto.cli import main

sys.exit(main())
