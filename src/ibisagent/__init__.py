"""Name an object in a biomedical image, get its mask: a language model that segments by clicking, in plain text.

The public names are those of `__init__.pyi` beside this file. Each is loaded when it is first used (PEP 562), so
`import ibisagent` costs next to nothing and loads no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
