"""The command `align-tf`.

main            the table of commands, and what every one of them ends in
common          what they share: loading a model, lines to stderr, tables
quickstart, classify, evaluate, export, convert, train, embed, index, search, serve, demo, plot
                a file a command: its arguments and its run
"""
