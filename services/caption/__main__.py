"""`python -m services.caption --port N`: the caption service in a process of its own."""

from services.caption.server import main

if __name__ == "__main__":
    main()
