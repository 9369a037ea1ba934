"""HTTP servers. `chat`: our models to anything that speaks the OpenAI chat protocol."""
