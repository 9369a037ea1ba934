"""The agent inside other frameworks: lmms-eval and verl."""
