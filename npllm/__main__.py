"""`python -m npllm`: the command line."""

import sys

from npllm.cli import main

sys.exit(main())
