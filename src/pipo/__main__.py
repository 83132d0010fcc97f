"""`python -m pipo` is `pipo`."""

from pipo.cli.main import main

if __name__ == "__main__":
    main()
