"""`python -m services.frame --port N`: the frame service in a process of its own."""

from services.frame.server import main

if __name__ == "__main__":
    main()
