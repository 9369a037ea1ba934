"""The cold-start factory: from image-mask pairs to questions, expert episodes with thoughts, and training files.

`stages.build` runs trajectories -> questions -> thoughts -> reflection -> filter -> export (paper, section 3.1).
"""
