"""`python -m align_tf.cli`."""

import sys

from align_tf.cli.main import main

sys.exit(main())
