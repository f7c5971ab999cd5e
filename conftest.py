"""One thread a test process: pytest runs several of them."""

import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)
# who wants to know that a test fails, and not how small its counter-example can be
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])
