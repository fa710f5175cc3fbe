"""Where the program begins: Ctrl-C while Python still imports the commands is no traceback."""

import sys


def main() -> int:
    """Runs the command line.

    Returns:
        Exit code, as `align_tf.cli.main.main` gives it; 130 after Ctrl-C.
    """
    try:
        from align_tf.cli.main import main

        return main()
    except KeyboardInterrupt:
        print("align-tf: stopped", file=sys.stderr)
        return 130
