"""Questions and thoughts for expert episodes: phrasings, what an image shows as text, and who writes it down.

`phrasings` holds every question template, `visual_facts` what can be seen at one turn, `rules` the offline teacher,
`checks` what refuses a thought, `endpoint` a teacher behind an OpenAI-compatible server.
"""
