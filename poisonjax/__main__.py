"""`python -m poisonjax` is `poisonjax`."""

import sys

from poisonjax.cli import main

sys.exit(main())
