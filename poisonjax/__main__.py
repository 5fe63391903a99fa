"""`python -m poisonjax` is `poisonjax`."""

import sys

from poisonjax.commands.main import main

sys.exit(main())
