"""Run an agent on an image or a volume, write what came of it, play it again."""
