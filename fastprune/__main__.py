"""`python -m fastprune` is the `fastprune` command."""

import sys

from fastprune.cli import main

sys.exit(main())
