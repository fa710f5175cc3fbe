"""The command `align-tf`.

entry           where the program begins
main            the table of commands, and what every one of them ends in
parser          argparse with mistakes in one line, and the nearest of what there is
common          what they share: loading a model, lines to stderr, tables
pictures        image files of arguments: folders, globs, a list on stdin
settings        a recipe's settings as flags
quickstart, classify, evaluate, export, convert, interpolate, train, tpu_check, push, embed, index,
search, serve, demo, plot
                a file a command: its arguments and its run
"""
