"""HTTP servers. `chat`: models to anything that speaks the OpenAI protocol. `segmenter_app`: segmenters to `remote`."""
