"""`python -m corral`."""

from corral.cli.entry import main

if __name__ == "__main__":
    main()
