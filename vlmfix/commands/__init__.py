"""The commands, one file for what belongs together; `vlmfix/cli.py` puts them on the command line."""
