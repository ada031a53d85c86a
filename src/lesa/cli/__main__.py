"""`python -m lesa.cli`, as `lesa`."""

import sys

from lesa.cli import main

if __name__ == "__main__":
    sys.exit(main())
