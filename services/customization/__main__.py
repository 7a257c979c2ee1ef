"""`python -m services.customization --port N`: the customization service in a process of its own."""

import sys

from services.customization.server import main

if __name__ == "__main__":
    sys.exit(main())
