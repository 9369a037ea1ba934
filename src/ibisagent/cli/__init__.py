"""The command line, `ibisagent`."""

from ibisagent.cli.app import app as app
