"""`python -m ibisagent`: the command line, where the script `ibisagent` is not on the path."""

from ibisagent.cli import app

app(prog_name="ibisagent")
