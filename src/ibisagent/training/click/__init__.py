"""Training of `ibis-click`: states of clicking, and the loop over them."""
