"""`python -m tokcompile.cli`."""

import sys

from tokcompile.cli import main

sys.exit(main())
