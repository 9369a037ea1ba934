"""Training of `ibis-nano`: what it is taught, from whose states, and the loop."""
