"""FullGrad-completeness: trace a model, find what breaks it, derive the mend, prove and apply it.

report = check_completeness(model)                  # of the gradient as it is
report = check_completeness(model, policy="libra")  # with that policy's edits
balanced = balance(model)                           # same forward bit for bit, edited backward
parts = fullgrad(balanced, x, target=3)             # the logit, split into its contributions
found = explain(model, x, "fullgrad+", policy="libra")  # the same as a map over the image
"""

import lazy_loader

# a name is imported when it is used: __init__.pyi says from where
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
