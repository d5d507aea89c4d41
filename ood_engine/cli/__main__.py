"""The command line as `python -m ood_engine.cli`."""

import sys

from . import main

sys.exit(main())
