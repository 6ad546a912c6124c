"""`python -m lowvram`: the command line."""

from lowvram.cli import main

if __name__ == "__main__":
    main()
