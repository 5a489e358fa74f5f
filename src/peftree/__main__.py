"""`python -m peftree`: the command line."""

from peftree.cli import main

if __name__ == "__main__":
    main()
