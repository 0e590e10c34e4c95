"""`python -m jaxtrain COMMAND`: hands over to `jaxtrain.cli`."""

import sys

from jaxtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
