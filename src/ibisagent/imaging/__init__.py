"""Image files, masks and clicks in pixels: reading, measuring, writing, and what a file may cost."""
