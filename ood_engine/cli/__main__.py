"""`python -m ood_engine.cli`: the command line."""

import sys

from . import main

sys.exit(main())
