"""`python -m corral`."""

from corral.cli.app import main

if __name__ == "__main__":
    main()
