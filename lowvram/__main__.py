"""`python -m lowvram`: the command line."""

from lowvram.cli.app import main

if __name__ == "__main__":
    main()
