"""`python -m align_tf`: the command line."""

import sys

from align_tf.cli.entry import main

sys.exit(main())
