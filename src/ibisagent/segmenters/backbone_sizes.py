"""Sizes of the backbone's input and features, for those who do not need the network itself, which needs torch."""

SIDE = 256  # pixels of the square that images are squashed to
GRID = 32
WIDTH = 128  # channels of the features
