"""Questions and thoughts for expert episodes: phrasings, what a picture shows in words, and who writes it down.

`phrasings` holds every question template, `scenes` what can be seen at one turn, `rules` the offline teacher, `checks`
what refuses a thought, `endpoint` a teacher behind an OpenAI-compatible server.
"""
