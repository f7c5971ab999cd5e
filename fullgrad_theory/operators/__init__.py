"""What each operation is: one record an operation, in tables by algebraic class."""

import lazy_loader

# a name is imported when it is used: what only names classes and roles needs no torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
