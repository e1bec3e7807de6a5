"""``python -m antransformer``."""

import sys

from antransformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
