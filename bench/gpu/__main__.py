"""``python -m bench.gpu``: see ``command``."""

import sys

from bench.gpu.command import main

sys.exit(main())
